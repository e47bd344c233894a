"""Notebook 04 on what smoke lacks: all arms and models, both modalities, inner validation, no truth.

Every network is the tiny one under another's name, every cube noise.
"""

import itertools
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import yaml
from tiny import first_release

from ipmn_core import data, models, params, pipeline, runs
from ipmn_core.names import CENTERS, LABELS, TASKS
from ipmn_core.runs import probes

NAME = "04_analysis.ipynb"


def shown(folder):
    """What the executed notebook shows as text, once it has no warning, traceback or undefined number.

    Every figure that it saves is in the profile's folder.
    """
    notebook = nbformat.read(folder / "notebooks" / NAME, 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if "data" in output]
    text = "\n".join(bundle.get("text/html", bundle.get("text/plain", "")) for bundle in shown)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert not re.findall(r"(?i)traceback|warning|>\s*(?:nan|none|-?inf)\s*<", text)
    source = "\n".join(cell.source for cell in notebook.cells)
    figures = set(re.findall(r'"(\w+)",\s+p\.folder / "figures"', source))
    assert len(figures) == 7 and {path.stem for path in (folder / "figures").glob("*.png")} >= figures
    return text


def six_of_each_class(root):
    """A release with six patients of each center and class, none of high risk at AHN."""
    cells = itertools.product(CENTERS, range(len(LABELS)), range(6))
    rows = [(f"{center}_{label}{k}", label) for center, label, k in cells if (center, label) != ("AHN", 2)]
    return first_release(root, rows, rows)


def test_the_review_of_the_smoke_run_is_clean(smoke):
    assert "no inner validation" in shown(smoke.folder)


@pytest.mark.slow
def test_the_review_of_all_arms_and_models_is_complete(tmp_path, monkeypatch):
    values = {"profile": "review", "outputs": str(tmp_path), "data": str(tmp_path / "data"), "device": "cpu"}
    values |= {"size": 32, "epochs": 2, "rounds": 2, "inner_validation": 0.2, "threads": 1, "jobs": 1}
    values |= {"multiclass_folds": 3, "binary_folds": 3}
    (tmp_path / "review.yaml").write_text(yaml.safe_dump(values))
    p = params.load(tmp_path / "review.yaml")
    six_of_each_class(tmp_path / "data")
    cohort = data.open_cohort(p)
    noise = np.random.default_rng(0).random((len(cohort), 32, 32, 32)).astype(np.float16)
    cohort = replace(cohort, cubes=noise, key="noise")
    for name in p.multiclass_models:
        monkeypatch.setitem(models.MODELS, name, models.MODELS["tiny"])
    features = np.random.default_rng(1).random((len(cohort), 3))  # there are no files to read headers from
    for name in probes.PROBES:
        monkeypatch.setitem(probes.PROBES, name, lambda scans, _: features[: len(scans)])
    for task in TASKS:
        runs.run_grid(p, task, cohort)
        probes.fit(p, task, cohort)
    notebook = params.project_root() / "notebooks" / NAME
    pipeline.execute(notebook, p.folder / "notebooks" / NAME, {"profile": str(tmp_path / "review.yaml")})
    text = shown(p.folder)
    assert all(name in text for name in (*p.arms, *p.multiclass_models, *probes.PROBES))
    assert "no inner validation" not in text and "no positive case" in text
    assert not re.search(r">\s*(oracle|guideline)\s*<", text)  # real data have neither
