import os
import resource
import shutil
import subprocess
import sys

import openpyxl
import pytest
import yaml

from ipmn_core import cli, cohort, pipeline

COMMAND = "import sys; from ipmn_core.cli import main; status = main(); print('torch' in sys.modules); sys.exit(status)"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project that the working directory lies in, with its `params/` and `notebooks/`."""
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def broken(phantom_root, tmp_path):
    """A cohort with a label out of range, a label without a file, an unreadable volume and an unknown center."""
    root = tmp_path / "broken"
    shutil.copytree(phantom_root, root, copy_function=os.link)
    sheet = root / "IPMN_labels_total.xlsx"
    book = openpyxl.load_workbook(sheet)
    rows = book.active
    column = [cell.value for cell in rows[1]].index("Risk assessment") + 1
    rows.cell(3, column).value = 7
    rows.cell(4, 1).value = "riverside_12"
    sheet.unlink()  # a link to the whole cohort's
    book.save(sheet)
    images = root / "IPMN_images_masks" / "t1" / "images"
    (images / "AHN01.nii.gz").unlink()
    whole = (images / "IU_3.nii.gz").read_bytes()
    (images / "IU_3.nii.gz").unlink()
    (images / "IU_3.nii.gz").write_bytes(whole[: len(whole) // 2])
    return root


def profile(project, **settings):
    path = project / "params" / "mine.yaml"
    path.write_text(yaml.safe_dump({"profile": "mine", **settings}))
    return str(path)


def fault(capsys):
    """What was said of a fault: to stderr, beginning with the command's name, without a traceback."""
    said = capsys.readouterr().err
    assert said.startswith("ipmn: ") and "Traceback" not in said
    return said.strip()


def test_help_lists_the_commands_within_a_second_of_cpu_and_without_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = COMMAND.replace("status = main()", "sys.exit = lambda status: None; main(['--help'])")
    told = subprocess.run(
        [sys.executable, "-c", "import sys; from ipmn_core import cli\ntry: cli.main(['--help'])\n"
         "except SystemExit as end: print(end.code, 'torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
