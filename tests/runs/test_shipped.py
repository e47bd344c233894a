"""Shipped runs: they take the place of training where settings and data are the same."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
from small_profile import profile, small_cohort

from ipmn_core import runs
from ipmn_core.runs import store, workers


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A project with both folds of one arm shipped, without weights; the cohort they were trained on."""
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    cohort, reference = small_cohort(), tmp_path / "outputs" / "reference"
    runs.train(profile(reference, keep_models=[]), ["binary"], cohort)
    return cohort


def trained(monkeypatch):
    """The names of the runs that are trained from now on."""
    names = []
    monkeypatch.setattr(workers, "execute", lambda p, run, cohort: names.append(runs.named(run)))
    return names


def test_shipped_runs_are_read_and_not_trained(shipped, monkeypatch):
    names, p = trained(monkeypatch), profile("outputs")
    read = runs.run_grid(p, "binary", shipped)
    assert not names and read["fold"].nunique() == 2
    pd.testing.assert_frame_equal(read, runs.predictions(profile("outputs/reference"), "binary"))


@pytest.mark.parametrize("changed", ["settings", "data", "fresh"])
def test_other_settings_or_data_or_a_fresh_start_train_anew(shipped, monkeypatch, changed):
    names, p = trained(monkeypatch), profile("outputs", **({"lr": 0.1} if changed == "settings" else {}))
    cohort = replace(shipped, key="other") if changed == "data" else shipped
    if changed == "fresh":
        store.discard(p)
    runs.train(p, ["binary"], cohort)
    assert len(names) == 2


def test_what_is_missing_among_the_shipped_runs_is_trained(shipped, monkeypatch):
    shutil.rmtree("outputs/reference/t/runs/binary/t1/centralized/fold1")
    names = trained(monkeypatch)
    runs.train(profile("outputs"), ["binary"], shipped)
    assert names == ["binary t1 centralized fold 1"]
