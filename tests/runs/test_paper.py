"""The paper's profile on the real set's layout, as far as a machine without the data and a GPU can."""

import json

import pandas as pd
import pytest
from test_params import PROFILES

from ipmn_core import data, params, phantom, runs


@pytest.fixture(scope="module")
def paper():
    return params.load(next(path for path in PROFILES if path.stem == "paper"))


def test_every_run_has_the_protocols_settings(paper):
    for run in (run for task in runs.TASKS for run in runs.grid(paper, task)):
        settings = runs.settings_of(paper, run)
        assert (settings["epochs"], settings["local_epochs"], settings["size"]) == (100, 1, 96)
        assert (settings["batch_size"], settings["batches_per_epoch"]) == (16, None)
        assert settings["max_per_cell"] is None and not settings["bfloat16"]
        assert settings["mu"] == {"fedavg": 0.0, "fedprox_0.1": 0.1, "fedprox_0.3": 0.3}.get(run.arm)


@pytest.mark.slow
def test_a_round_of_densenet_at_96_cubed_runs_on_the_first_releases_layout(paper, tmp_path):
    root = phantom.write(tmp_path / "data", layout="first", max_per_cell=1, progress=False)
    where = {"outputs": str(tmp_path), "data": str(root)}
    p = paper.model_copy(update=where | {"epochs": 1, "rounds": 1, "threads": 2})
    scans = data.open_cohort(p)
    scans = scans[(scans["center"].isin(["NYU", "EMC"])) & (scans["modality"] == "t2")].reset_index(drop=True)
    cubes = data.load_cubes(scans, p.size, p.folder / "cache")
    assert cubes.array.shape == (6, 96, 96, 96)
    folds = pd.Series([0, 1, 1] * 2)
    folder = runs.execute(p, runs.Run("binary", "t2", "fedprox_0.3", 0), scans, folds, cubes)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert predictions["center"].tolist() == ["NYU", "EMC"]
    assert json.loads((folder / "run.json").read_text())["settings"]["model"] == "densenet121"
