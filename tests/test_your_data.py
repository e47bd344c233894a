"""docs/your-data.md, word for word: its code blocks, in their order, in an empty folder."""

import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ipmn_core import cli

PAGE = (Path(__file__).parents[1] / "docs" / "your-data.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def write_tree(folder):
    """Eight cases of each label at two hospitals, as the page describes them: a ball in an ellipsoid."""
    rng = np.random.default_rng(0)
    grid = np.indices((24, 20, 12)) - np.array([12, 10, 6])[:, None, None, None]
    organ = (grid[0] / 9) ** 2 + (grid[1] / 7) ** 2 + (grid[2] / 5) ** 2 < 1
    for hospital in ("Lakeside", "St. Anne's"):
        for label, radius in (("benign", 2), ("malignant", 4)):
            here = folder / "scans" / hospital / label
            here.mkdir(parents=True)
            for k in range(8):
                image = rng.normal(100, 10, organ.shape) + 80 * ((grid**2).sum(0) < radius**2)
                for name, data in ((f"{label[0]}{k}", image), (f"{label[0]}{k}_mask", organ)):
                    volume = nib.Nifti1Image(data.astype(np.uint8), np.diag([4, 4, 8, 1]))
                    nib.save(volume, here / f"{name}.nii.gz")


def follow(folder, monkeypatch, capsys, until):
    """Do what each block says, up to the command `until`; what the commands printed."""
    monkeypatch.chdir(folder)
    said = {}
    for kind, text in BLOCKS:
        if kind == "yaml":
            Path(re.search("Save this as `(.*?)`", PAGE)[1]).write_text(text)
        elif kind == "python":
            exec(text, {})
        else:
            for line in text.splitlines():
                tool, *arguments = shlex.split(line)
                assert tool == "ipmn" and cli.main(arguments) == 0, capsys.readouterr()
                said[line] = capsys.readouterr().out
                if line == until:
                    return said
    raise AssertionError(f"no command is {until}")


def test_the_page_leads_from_a_folder_of_files_to_a_cohort_that_passes(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path)
    said = follow(tmp_path, monkeypatch, capsys, "ipmn check own.yaml")
    example, own = said["ipmn check example/scans.csv"], said["ipmn check own.yaml"]
    assert "24 labeled scans, 0 error(s)" in example and "positive: malignant" in example
    assert re.search(r"St. Anne's +\| mri +\| +8 \| +8 \| +16", own)
    assert "32 labeled scans, 0 error(s), 0 other remark(s)" in own


@pytest.mark.slow
def test_the_page_leads_to_the_report(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path)
    follow(tmp_path, monkeypatch, capsys, "ipmn run own.yaml")
    results = tmp_path / "outputs" / "own"
    table = pd.read_csv(results / "tables" / "table3.csv")
    assert {"Lakeside", "St. Anne's", "global"} == set(table["center"]) and set(table["modality"]) == {"mri"}
    assert set(table["method"]) == {"centralized", "fedavg", "fedprox_0.1"}
    report = re.sub(r"[A-Za-z0-9+/]{99,}", "", (results / "report.html").read_text())  # without pictures
    assert "malignant" in report and not re.search(r"\bNYU\b", report)
