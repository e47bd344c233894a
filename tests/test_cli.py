import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import openpyxl
import pytest
import yaml

from ipmn_core import cli, data, pipeline

HELP = """
import sys, time
from ipmn_core import cli
try:
    cli.main(["--help"])
except SystemExit as end:
    heavy = {"torch", "monai", "pandas"} & set(sys.modules)
    print(end.code, time.process_time(), *heavy)
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
    """A cohort with a label out of range, an unknown center, a label without a file and half a volume."""
    root = tmp_path / "broken"
    shutil.copytree(phantom_root, root, copy_function=os.link)
    sheet, images = root / "IPMN_labels_total.xlsx", root / "IPMN_images_masks" / "t1" / "images"
    book = openpyxl.load_workbook(sheet)
    rows = book.active
    column = [cell.value for cell in rows[1]].index("Risk assessment") + 1
    rows.cell(3, column).value = 7
    rows.cell(row_of(rows, "nyu_0113"), 1).value = "riverside_12"
    half = (images / "IU_3.nii.gz").read_bytes()[:20000]
    for path in (sheet, images / "AHN01.nii.gz", images / "IU_3.nii.gz"):
        path.unlink()  # before writing, for it is a link into the whole cohort
    book.save(sheet)
    (images / "IU_3.nii.gz").write_bytes(half)
    return root


def row_of(rows, name):
    return next(row[0].row for row in rows.iter_rows() if name in [cell.value for cell in row])


def profile(project, **settings):
    path = project / "params" / "mine.yaml"
    path.write_text(yaml.safe_dump({"profile": "mine", **settings}))
    return str(path)


def fault(capsys):
    """What was said of a fault on stderr, under the command's name and without a traceback."""
    said = capsys.readouterr().err.strip()
    assert said.startswith("ipmn: ") and "Traceback" not in said
    return said


def test_help_lists_the_commands_within_a_second_of_cpu_and_without_heavy_imports():
    told = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    for command in ("run", "report", "fetch", "check", "predict", "export", "phantom"):
        assert f"\n    {command} " in told
        assert f"ipmn {command} " in told.split("examples:")[1]
    status, seconds, *heavy = told.splitlines()[-1].split()
    assert status == "0" and float(seconds) < 1 and not heavy


def test_the_cohort_is_imported_at_once_beside_pandas_and_without_torch():
    code = """
import sys, time, pandas
start = time.process_time()  # pandas takes its time, and more on a busy machine
import ipmn_core.data
print(time.process_time() - start, 'torch' in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, torch_too = told.split()
    assert float(seconds) < 0.3 and torch_too == "False"


def test_the_command_is_installed():
    told = subprocess.run([Path(sys.executable).with_name("ipmn"), "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith("usage: ipmn")


@pytest.mark.parametrize("arguments", [[], ["train"], ["run"], ["check", "a", "b"], ["run", "x", "--quick"]])
def test_wrong_usage_exits_with_2_and_says_how_to(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and "usage: ipmn" in capsys.readouterr().err


def test_check_of_a_whole_cohort_prints_table_1_and_exits_with_0(phantom_root, phantom_scans, capsys):
    assert cli.main(["check", str(phantom_root)]) == 0
    said = capsys.readouterr().out
    assert data.table1(phantom_scans).to_markdown(index=False) in said
    assert f"{phantom_root}: {len(phantom_scans)} labelled scans, 0 error(s)" in said.splitlines()[-1]


def test_check_of_a_broken_cohort_names_file_row_and_case_with_the_remedy_and_exits_with_1(broken, capsys):
    assert cli.main(["check", str(broken)]) == 1
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("| error")]
    for where, problem, remedy in (
        ("IPMN_labels_total.xlsx row 3", "the label 7", "correct it"),
        ("IPMN_labels_total.xlsx row", "'riverside_12' gives no center", "rename the scan"),
        ("IPMN_labels_total.xlsx row", "no image of AHN01", "add the file"),
        ("t1/images/IU_3.nii.gz", "cannot be read", "download it again"),
    ):
        assert any(where in line and problem in line and remedy in line for line in lines), (where, problem)
    assert f"{len(lines)} error(s)" in said.splitlines()[-1]


def test_check_prints_names_as_they_are_spelt_in_one_line_and_no_text_of_a_header(broken, capsys):
    images = broken / "IPMN_images_masks" / "t1" / "images"
    (images / "nyu_\x1b[2J|\n9.nii.gz").write_bytes(b"")
    whole = next(images.glob("EMC*.nii.gz"))
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(whole.read_bytes()))
    image.header["descrip"] = b"DOE^JANE"
    whole.unlink()  # a link into the whole cohort
    nibabel.save(image, whole)
    assert cli.main(["check", str(broken)]) == 1
    said = capsys.readouterr().out
    assert r"nyu_\x1b[2J\|\n9.nii.gz" in said and "\x1b" not in said and "DOE" not in said
    assert re.search(r"\| note .*t1/images .*1 of \d+ files have text in their header \(descrip\)", said)


def test_check_of_no_cohort_exits_with_1_and_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "absent")]) == 1
    assert "IPMN_labels_total.xlsx" in capsys.readouterr().out


def test_phantom_writes_a_cohort_that_can_be_read(tmp_path, capsys):
    root = tmp_path / "cohort"
    arguments = [
        "phantom",
        str(root),
        "--layout",
        "first",
        "--max-per-cell",
        "1",
        "--jobs",
        "1",
        "--seed",
        "3",
    ]
    assert cli.main(arguments) == 0
    assert str(root / "truth.csv") in capsys.readouterr().out and (root / "truth.csv").is_file()
    scans = data.read(root)
    assert len(scans) == 40 and set(scans["mask"]) == {""}


def test_phantom_refuses_a_folder_that_exists_and_leaves_it_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert cli.main(["phantom", str(tmp_path)]) == 1
    said = fault(capsys)
    assert f"{tmp_path} exists" in said and "another folder" in said and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_run_of_a_missing_profile_is_one_sentence(project, capsys):
    assert cli.main(["run", "params/absent.yaml"]) == 1
    said = fault(capsys)
    assert "params/absent.yaml: no such file" in said and "\n" not in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "1e-3"}, "lr: .*'1e-3'.*write 1.0e-3"),
        ({"learning_rate": 0.1}, "learning_rate: unknown setting; known are profile"),
        ({"epochs": 0}, "epochs: .*greater than or equal to 1, not 0"),
    ],
)
def test_run_of_an_ill_typed_profile_names_the_setting(project, capsys, settings, message):
    assert cli.main(["run", profile(project, **settings)]) == 1
    said = fault(capsys)
    assert "mine.yaml: 1 setting(s) to mend" in said and re.search(message, said)
    assert not (project / "outputs").exists()


def test_run_with_a_data_folder_that_is_not_there_says_where_to_get_it(project, capsys):
    assert cli.main(["run", profile(project, data="data/ipmn")]) == 1
    assert "data/ipmn: no such folder" in (said := fault(capsys)) and "osf.io" in said


def test_run_with_too_few_cases_for_the_folds_names_the_center_before_any_notebook(
    project, phantom_root, capsys, monkeypatch
):
    monkeypatch.setattr(pipeline, "execute", lambda *_: pytest.fail("a notebook was run"))
    small = {"data": str(phantom_root), "modalities": ["t1"], "size": 32, "device": "cpu"}
    assert cli.main(["run", profile(project, **small)]) == 1
    said = fault(capsys)
    assert "NYU t1: cannot be split into 5 folds (1 no risk, 1 low risk, 1 high risk)" in said
    assert "fewer folds" in said and "\n" not in said
    left = [path.name for path in (project / "outputs").rglob("*")]
    assert left == ["mine", ".lock"]  # nor was time spent on cubes


@pytest.fixture
def pretended(project, monkeypatch):
    """A project in which a profile runs in no time."""
    (project / "outputs" / "mine").mkdir(parents=True)

    def run(p):
        (p.folder / "tables").mkdir()
        (p.folder / "tables" / "table3_beside_paper.md").write_text("| Center | Method |")
        yield from (p.folder / "notebooks" / f"{stem}.ipynb" for stem in pipeline.NOTEBOOKS)

    monkeypatch.setattr(pipeline, "prepare", lambda p, fresh: (p.folder / f"{fresh=}").touch())
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "write_report", lambda p: p.folder / "report.html")
    return project


def test_run_prints_each_notebook_table_3_and_where_everything_lies(pretended, capsys):
    assert cli.main(["run", profile(pretended)]) == 0
    said = capsys.readouterr().out
    assert all(f"{stem} done" in said for stem in pipeline.NOTEBOOKS) and "| Center | Method |" in said
    for name in ("tables", "figures", "notebooks"):
        assert f"{pretended / 'outputs' / 'mine' / name}/" in said
    assert said.endswith(f"report  {pretended / 'outputs' / 'mine' / 'report.html'}\n")


def test_report_writes_the_page_alone_and_says_where(pretended, capsys):
    assert cli.main(["report", profile(pretended)]) == 0
    assert capsys.readouterr().out == f"report in {pretended / 'outputs' / 'mine' / 'report.html'}\n"


def test_report_of_a_profile_that_never_ran_is_one_sentence(project, capsys):
    assert cli.main(["report", profile(project)]) == 1
    said = fault(capsys)
    assert "01_data_exploration.ipynb: no such notebook; `ipmn run` executes it" in said and "\n" not in said


@pytest.mark.parametrize("fresh", [True, False])
def test_training_is_repeated_only_on_request(pretended, fresh):
    assert cli.main(["run", profile(pretended), *["--fresh"] * fresh]) == 0
    assert (pretended / "outputs" / "mine" / f"{fresh=}").exists()


def test_an_interruption_exits_with_130_and_says_that_nothing_is_lost(pretended, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare", interrupt)
    assert cli.main(["run", profile(pretended)]) == 130
    assert "interrupted; what is finished is kept" in capsys.readouterr().err


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_fault_is_raised_whole_for_who_asks_to_debug(project, monkeypatch):
    monkeypatch.setenv("IPMN_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["run", "absent.yaml"])
