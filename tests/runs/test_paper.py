"""The paper's profile on the real set's layout, as far as a machine without the data and a GPU can."""

import json

import pandas as pd
import pytest
from test_params import PROFILES

from ipmn_core import data, params, phantom, runs


@pytest.fixture(scope="module")
def paper():
    return params.load(next(path for path in PROFILES if path.stem == "paper"))


@pytest.mark.slow
def test_a_round_of_densenet_at_96_cubed_runs_on_the_first_releases_layout(paper, tmp_path):
    root = phantom.write(tmp_path / "data", layout="first", max_per_cell=1, progress=False)
    where = {"outputs": str(tmp_path), "data": str(root)}
    p = paper.model_copy(update=where | {"rounds": 1, "threads": 2, "binary_folds": 2, "modalities": ("t2",)})
    cohort = data.load_cohort(p)
    cohort = cohort.where(cohort.scans["center"].isin(["NYU", "EMC"]))
    assert cohort.cubes.shape == (6, 96, 96, 96)
    folder = runs.execute(p, runs.Run("binary", "t2", "fedprox_0.3", 1), cohort)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert set(predictions["center"]) == {"NYU", "EMC"}
    assert json.loads((folder / "run.json").read_text())["settings"]["model"] == "densenet121"
