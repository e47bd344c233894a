"""The paper's profile on the real set's layout, as far as a machine without the data and a GPU can."""

import json

import pandas as pd
import pytest
from test_params import PROFILES

from ipmn_core import data, params, phantom, runs


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """params/paper.yaml, and the same pointed at a phantom in the first release's layout, for one round."""
    p = params.load(next(path for path in PROFILES if path.stem == "paper"))
    folder = tmp_path_factory.mktemp("paper")
    root = phantom.write(folder / "data", layout="first", max_per_cell=1, progress=False)
    return p, p.model_copy(
        update={"outputs": str(folder), "data": str(root), "epochs": 1, "rounds": 1, "threads": 2}
    )


def test_it_asks_for_the_real_data_in_one_sentence(paper, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.CohortError, match=r"data/ipmn: no such folder.*osf\.io/74vfs"):
        data.open_cohort(paper[0])


def test_every_run_of_it_has_the_protocols_settings(paper):
    for task in runs.TASKS:
        for run in runs.grid(paper[0], task):
            settings = runs.settings_of(paper[0], run)
            assert (settings["epochs"], settings["local_epochs"], settings["size"]) == (100, 1, 96)
            assert (settings["batch_size"], settings["batches_per_epoch"]) == (16, None)
            assert settings["max_per_cell"] is None and not settings["bfloat16"]
            assert settings["mu"] == {"fedavg": 0.0, "fedprox_0.1": 0.1, "fedprox_0.3": 0.3}.get(run.arm)


def test_a_round_of_densenet_at_96_cubed_runs_on_the_first_releases_layout(paper):
    _, p = paper
    scans = data.open_cohort(p)
    scans = scans[(scans["center"].isin(["NYU", "EMC"])) & (scans["modality"] == "t2")].reset_index(drop=True)
    cubes = data.load_cubes(scans, p.size, p.folder / "cache")
    assert cubes.array.shape == (6, 96, 96, 96)
    folds = pd.Series([0, 1, 1] * 2)
    folder = runs.execute(p, runs.Run("binary", "t2", "fedprox_0.3", 0), scans, folds, cubes)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert predictions["center"].tolist() == ["NYU", "EMC"]
    assert json.loads((folder / "run.json").read_text())["settings"]["model"] == "densenet121"
