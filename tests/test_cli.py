import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ipmn_core import cli, data, phantom, pipeline
from ipmn_core.params import Params

HELP = """
import sys
from ipmn_core import cli
try:
    cli.main(["--help"])
finally:
    print({"torch", "monai", "pandas"} & set(sys.modules))
    import ipmn_core.data
    print("torch" in sys.modules)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, with its `params/` and `notebooks/`, in which the command is given."""
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def broken(phantom_root, tmp_path):
    """A cohort with a label without a file, half a volume, and an image whose name clears a screen."""
    root = tmp_path / "broken"
    shutil.copytree(phantom_root, root, copy_function=os.link)
    images = root / "IPMN_images_masks" / "t1" / "images"
    half = (images / "IU_3.nii.gz").read_bytes()[:20000]
    for name in ("AHN01.nii.gz", "IU_3.nii.gz"):
        (images / name).unlink()  # before writing, because it is a link into the cohort of all tests
    (images / "IU_3.nii.gz").write_bytes(half)
    (images / "nyu_\x1b[2J|\n9.nii.gz").write_bytes(b"")
    return root


def profile(project, **settings):
    path = project / "params" / "mine.yaml"
    path.write_text(yaml.safe_dump({"profile": "mine", **settings}))
    return str(path)


def sentence(capsys):
    """The one line on stderr, under the command's name and without a traceback."""
    said = capsys.readouterr().err.strip()
    assert said.startswith("ipmn: ") and "\n" not in said
    return said


def test_help_lists_the_commands_and_loads_nothing_heavy_and_the_data_room_no_torch():
    told = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    for command in ("init", "run", "report", "fetch", "check", "predict", "export", "phantom", "params"):
        assert f"\n    {command} " in told
    assert told.splitlines()[-2:] == ["set()", "False"]


def test_the_command_is_installed():
    told = subprocess.run([Path(sys.executable).with_name("ipmn"), "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith("usage: ipmn")


@pytest.mark.parametrize("arguments", [[], ["train"], ["run", "x", "--quick"]])
def test_wrong_usage_exits_with_2_and_says_how_to(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and "usage: ipmn" in capsys.readouterr().err


def test_check_of_a_good_cohort_prints_table_1_and_exits_with_0(phantom_root, phantom_scans, capsys):
    assert cli.main(["check", str(phantom_root)]) == 0
    said = capsys.readouterr().out
    assert data.table1(data.read(phantom_root)).to_markdown(index=False) in said
    assert f"{phantom_root}: {len(phantom_scans)} labeled scans, 0 error(s)" in said.splitlines()[-1]


def test_check_of_a_broken_cohort_names_file_row_and_remedy(broken, capsys):
    assert cli.main(["check", str(broken)]) == 1
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    for where, problem, remedy in (
        ("IPMN_labels_total.xlsx row", "no image of 'AHN01'", "clear the label"),
        ("t1/images/IU_3.nii.gz", "cannot be read", "replace it"),
    ):
        assert any(where in line and problem in line and remedy in line for line in lines), (where, problem)
    assert f"{len(lines)} error(s)" in said.splitlines()[-1]
    assert "nyu_?[2J|?9.nii.gz" in said and "\x1b" not in said


def test_phantom_passes_its_settings_on_and_refuses_a_folder_that_exists(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep")
    assert cli.main(["phantom", str(tmp_path)]) == 1
    assert re.search(f"{tmp_path} exists.*another folder", sentence(capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    asked = []
    monkeypatch.setattr(phantom, "write", lambda root, **settings: asked.append(settings) or root)
    given = ["--layout", "first", "--max-per-cell", "1", "--jobs", "1", "--seed", "3", "--shortcut", "0.8"]
    given += ["--axes", "--centers", "A 1", "B"]
    assert cli.main(["phantom", str(tmp_path / "cohort"), *given]) == 0
    options = {"layout": "first", "max_per_cell": 1, "jobs": 1, "seed": 3, "shortcut": 0.8}
    assert asked == [options | {"centers": ["A 1", "B"], "axes": True}]
    assert str(tmp_path / "cohort" / "truth.csv") in capsys.readouterr().out


def test_a_missing_or_wrong_profile_and_one_that_never_ran_are_explained(project, capsys):
    assert cli.main(["run", "params/absent.yaml"]) == 1
    assert "params/absent.yaml: no such file" in sentence(capsys)
    assert cli.main(["run", profile(project, learning_rate=0.1)]) == 1
    assert re.search(r"^ipmn: .*mine\.yaml: 1 .*\n  learning_rate: unknown setting", capsys.readouterr().err)
    assert cli.main(["report", profile(project)]) == 1
    assert "01_data_exploration.ipynb: no such notebook; `ipmn run` executes it" in sentence(capsys)


def test_init_writes_profiles_and_notebooks_and_overwrites_nothing(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert cli.main(["init", str(folder)]) == 0
    assert "ipmn run params/demo.yaml" in capsys.readouterr().out
    assert len(list(folder.glob("notebooks/*.ipynb"))) == 4 and (folder / "params" / "demo.yaml").is_file()
    changed = folder / "params" / "demo.yaml"
    changed.write_text("mine")
    shutil.rmtree(folder / "notebooks")
    assert cli.main(["init", str(folder)]) == 1
    assert re.search(r"params/.*\.yaml exists.*another folder", sentence(capsys))
    assert changed.read_text() == "mine" and not (folder / "notebooks").exists()


def test_report_and_run_pass_their_options_on_and_an_interruption_is_130(project, capsys, monkeypatch):
    """What a whole run prints is in `test_notebooks`."""
    (project / "outputs" / "mine").mkdir(parents=True)
    monkeypatch.setattr(pipeline, "write_report", lambda p: p.folder / "report.html")
    assert cli.main(["report", profile(project)]) == 0
    folder, asked = project / "outputs" / "mine", []
    assert capsys.readouterr().out == f"report in {folder / 'report.html'}\n"

    def interrupted(p, fresh):
        asked.append(fresh)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prepare", interrupted)
    assert cli.main(["run", profile(project)]) == cli.main(["run", profile(project), "--fresh"]) == 130
    assert asked == [False, True]  # training is repeated on request only
    assert "interrupted; finished runs are kept" in capsys.readouterr().err
    monkeypatch.setenv("IPMN_DEBUG", "1")  # a debugger gets the whole error
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["run", "absent.yaml"])


def test_params_prints_every_setting_as_a_line_of_a_profile_with_its_meaning(capsys):
    assert cli.main(["params"]) == 0
    printed = capsys.readouterr().out
    assert Params(**yaml.safe_load(printed)) == Params()
    assert len(printed.splitlines()) == len(Params.model_fields)
    assert "batch_size: 16  # cases per batch\n" in printed
