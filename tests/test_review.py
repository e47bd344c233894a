"""Notebook 04 on what smoke lacks: all arms and models, both modalities, inner validation, no truth.

Every network is the tiny one under another's name, every cube noise.
"""

import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from ipmn_core import models, params, pipeline, runs
from ipmn_core.data import Cohort
from ipmn_core.metrics import tables
from ipmn_core.names import TASKS
from ipmn_core.runs import probes

NAME = "04_analysis.ipynb"
FIGURES = {
    "forest_beside_paper",
    "majority",
    "optimism",
    "auc_intervals",
    "within_and_between",
    "reliability",
}
FIGURES |= {"decision_curves", "drift", "cosines", "gain"}


def scans_of(most):
    """At most `most` cases of each modality, center and class of table 1, none of high risk at AHN."""
    rows = []
    for cell in tables.paper(1).sort_values("modality", kind="stable").itertuples():
        for label, n in enumerate((cell.no_risk, cell.low_risk, cell.high_risk)):
            names = [f"{cell.center}_{1000 * label + k:04d}" for k in range(n)][:most]
            rows += [(name, name.casefold(), cell.center, cell.modality, label) for name in names]
    scans = pd.DataFrame(rows, columns=["case_id", "patient_id", "center", "modality", "label"])
    return scans.query("not (center == 'AHN' and label == 2)").reset_index(drop=True)


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """The settings, and the code cells of notebook 04 executed on finished runs."""
    folder = tmp_path_factory.mktemp("review")
    (folder / "data").mkdir()
    values = {"profile": "review", "outputs": str(folder), "data": str(folder / "data"), "device": "cpu"}
    values |= {"size": 32, "epochs": 2, "rounds": 2, "inner_validation": 0.2, "threads": 1, "jobs": 1}
    values |= {"three_class_folds": 3, "binary_folds": 3}
    (folder / "review.yaml").write_text(yaml.safe_dump(values))
    p = params.load(folder / "review.yaml")
    scans = scans_of(most=6)
    noise = np.random.default_rng(0).random((len(scans), 32, 32, 32)).astype(np.float16)
    cohort = Cohort(scans, noise, "noise")
    with pytest.MonkeyPatch.context() as patch:
        for name in p.three_class_models:
            patch.setitem(models.MODELS, name, models.MODELS["tiny"])
        features = np.random.default_rng(1).random((len(scans), 3))  # there are no files to read headers from
        patch.setattr(probes, "features", lambda _, scans, array: features[: len(scans)])
        for task in TASKS:
            runs.run_grid(p, task, cohort)
            probes.fit(p, task, cohort)
    target = p.folder / "notebooks" / NAME
    pipeline.execute(
        params.project_root() / "notebooks" / NAME, target, {"profile": str(folder / "review.yaml")}
    )
    return p, [cell for cell in nbformat.read(target, 4).cells if cell.cell_type == "code"]


def shown(cells):
    """What cells show as text: HTML where there is any, else plain text."""
    data = [output.data for cell in cells for output in cell.outputs if "data" in output]
    return "\n".join(bundle.get("text/html", bundle.get("text/plain", "")) for bundle in data)


def assert_clean(cells):
    """No warning, no traceback, and no undefined number without a reason."""
    streams = [output for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert not [stream.text for stream in streams if stream.name == "stderr"]
    assert not re.findall(r"(?i)traceback|warning", shown(cells))
    assert not re.findall(r"(?i)>\s*(?:nan|none|-?inf)\s*<", shown(cells))


def test_the_review_of_the_smoke_run_is_clean(smoke):
    notebook = nbformat.read(smoke.folder / "notebooks" / NAME, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert_clean(cells)
    assert "no inner validation" in shown(cells)
    assert {path.stem for path in (smoke.folder / "figures").glob("*.png")} >= FIGURES


@pytest.mark.slow
def test_the_review_of_all_arms_and_models_is_complete(reviewed):
    p, cells = reviewed
    assert_clean(cells)
    text = shown(cells)
    assert all(name in text for name in (*p.arms, *p.three_class_models, *probes.PROBES))
    assert "no inner validation" not in text and "no high-risk case" in text
    assert not re.search(r">\s*(oracle|guideline)\s*<", text)  # real data have neither
    pictures = {path.stem: plt.imread(path) for path in (p.folder / "figures").glob("*.png")}
    assert set(pictures) >= FIGURES and all(pictures[name].std() > 0.02 for name in FIGURES)
