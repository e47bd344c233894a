"""Notebook 04 on finished runs that nobody trained: what the smoke profile lacks, at the size of table 1."""

import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from test_notebooks import REVIEW, ROOT

from ipmn_core import federated, params, pipeline, runs
from ipmn_core.data import Cubes
from ipmn_core.federated import training
from ipmn_core.metrics import tables
from ipmn_core.runs import probes, run

NOTEBOOK = ROOT / "notebooks" / "04_analysis.ipynb"


def profile(folder, **changes):
    """The paper's arms, models and folds, an inner validation split, three epochs; real data, so no truth."""
    (folder / "data").mkdir(parents=True)
    values = {"profile": "review", "outputs": str(folder), "data": str(folder / "data"), "device": "cpu"}
    values |= {"size": 32, "epochs": 3, "rounds": 3, "inner_validation": 0.2, "threads": 1}
    return params.validate({**values, **changes}, "test")


def cohort_of(p, most=None):
    """As many cases of each modality, center and class as in table 1, or the first `most` of them."""
    rows = []
    for cell in tables.paper(1).sort_values("modality", kind="stable").itertuples():
        for label, n in enumerate((cell.no_risk, cell.low_risk, cell.high_risk)):
            names = [f"{cell.center}_{1000 * label + k:04d}" for k in range(n)][:most]
            rows += [(name, name.casefold(), cell.center, cell.modality, label) for name in names]
    scans = pd.DataFrame(rows, columns=["case_id", "patient_id", "center", "modality", "label"])
    return scans[scans["modality"].isin(p.modalities)].reset_index(drop=True)


def guess(y, n_classes, signal, seed):
    """Probabilities (N, K) float32 that know the labels (N,) the better, the higher the signal."""
    noise = np.random.default_rng(seed).standard_normal((len(y), n_classes))
    return softmax(noise + signal * np.eye(n_classes)[y], axis=1).astype(np.float32)


def untrained_epochs(p, run, settings, rows, array, learning):
    """Epochs as `runs._epochs` yields them, of networks that guess, the better from the second on."""
    held_out, clients = runs.held_out_of(rows), rows.loc[rows["role"] == "train", "center"].nunique()
    y, n_classes = runs.targets(held_out["label"].to_numpy(), run.task), 2 if run.task == "binary" else 3
    for epoch in range(1, settings["epochs"] + 1):
        seed = [*repr(run).encode(), epoch]
        moves = np.random.default_rng(seed).normal(0.3, 1, (clients, 50))
        products = moves @ moves.T if run.arm in federated.STRATEGIES else None
        prob = guess(y, n_classes, min(epoch, 2) / 2, seed)
        yield training.Epoch(epoch, 1 / epoch, prob, dict, products), torch.nn.Linear(1, 1)


def untrained_probe(name, x, y, train, test, seed):
    """Probabilities in the form of `probes.predict`."""
    return guess(y[test], y.max() + 1, 0.3, [*name.encode(), seed])


def write_runs(p, scans):
    """All runs of the profile on disk, arms and probes, without training or fitting any."""
    cubes = Cubes(np.zeros((len(scans), 1, 1, 1), np.float16), "made up")
    seen = lambda name, scans, array: np.zeros(len(scans))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_epochs", untrained_epochs)
        patch.setattr(runs.machine, "release_memory", lambda: None)  # a tenth of a second after each run
        patch.setattr(probes, "features", seen)
        patch.setattr(probes, "predict", untrained_probe)
        for task in runs.TASKS:
            runs.run_grid(p, task, scans, cubes)
            probes.fit(p, task, scans, cubes)


def reviewed(p):
    """The code cells of notebook 04, executed with the profile."""
    target = p.folder / "notebooks" / NOTEBOOK.name
    pipeline.execute(NOTEBOOK, target, p.model_dump(mode="json"))
    pipeline.check_executed(target)
    return [cell for cell in nbformat.read(target, 4).cells if cell.cell_type == "code"]


def shown(cells):
    """What the cells show as text: HTML where there is any, else plain text."""
    data = [output.data for cell in cells for output in cell.outputs if "data" in output]
    return "\n".join(bundle.get("text/html", bundle.get("text/plain", "")) for bundle in data)


def check_figures(p):
    """The figures of the review are there, and none is blank."""
    pictures = {path.stem: plt.imread(path) for path in (p.folder / "figures").glob("*.png")}
    assert set(pictures) >= REVIEW
    assert all(pictures[name].std() > 0.02 for name in REVIEW)


def check_outputs(cells):
    """No warning, no traceback, and no undefined number that a reader is left alone with."""
    streams = [output for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert not [stream.text for stream in streams if stream.name == "stderr"]
    assert not re.findall(r"(?i)traceback|warning", shown(cells))
    assert not re.findall(r"(?i)>\s*(?:nan|none|-?inf)\s*<", shown(cells))


def test_the_review_of_all_arms_at_the_size_of_the_real_data_is_complete(tmp_path):
    p = profile(tmp_path)
    write_runs(p, cohort_of(p))
    cells = reviewed(p)
    check_outputs(cells)
    check_figures(p)
    text = shown(cells)
    assert all(name in text for name in (*p.arms, *p.three_class_models, *probes.PROBES))
    assert "no inner validation" not in text
    assert not re.search(r">\s*(oracle|guideline)\s*<", text)  # real data have neither


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": ["centralized"], "modalities": ["t1"], "inner_validation": 0.0, "epochs": 1},
        {"arms": ["fedavg", "local_only"], "modalities": ["t2"], "epochs": 2, "rounds": 2},
    ],
    ids=["centralized alone on one modality without inner validation", "nothing centralized"],
)
def test_the_review_goes_through_with_less(tmp_path, changes):
    p = profile(tmp_path, three_class_models=["shufflenetv2"], **changes)
    write_runs(p, cohort_of(p, most=6).query("not (center == 'AHN' and label == 2)"))
    cells = reviewed(p)
    check_outputs(cells)
    check_figures(p)
    assert "no high-risk case" in shown(cells)
    assert ("no inner validation" in shown(cells)) == (p.inner_validation == 0)


def test_the_review_refuses_predictions_with_a_row_twice(tmp_path):
    p = profile(tmp_path, three_class_models=["shufflenetv2"], arms=["fedavg"], modalities=["t1"], rounds=1)
    write_runs(p, cohort_of(p, most=6))
    path = p.folder / "runs" / "binary" / "t1" / "fedavg" / "fold2" / "predictions.parquet"
    frame = pd.read_parquet(path)
    pd.concat([frame, frame.iloc[[5]]]).to_parquet(path, index=False)
    where = f"{re.escape(str(path))}, row {len(frame)} \\(case {frame['case_id'][5]} .*is given twice"
    with pytest.raises(pipeline.NotebookError, match=rf"04_analysis\.ipynb, In \[\d+\]: .*{where}"):
        reviewed(p)
    assert not (p.folder / "notebooks" / NOTEBOOK.name).exists()
