"""The dial and other training seeds: profiles of their own, their tables."""

import numpy as np
import pandas as pd
import pytest
from small_profile import profile

from ipmn_core import runs
from ipmn_core.runs import store, sweeps


def test_points_of_the_dial_are_profiles_and_the_profile_is_one_of_them(tmp_path):
    p = profile(tmp_path, dial_shifts=[0, 0.5, 1.0], dial_intensities=["minmax", "zscore"])
    points = sweeps.dial_points(p)
    at = [(q.phantom_shift, q.intensity, q.profile) for q in points]
    assert len(set(at)) == 6 and points[2] is p and at[1] == (0, "zscore", f"{p.profile}_shift0_zscore")
    assert len({q.phantom_root for q in points}) == 3  # a scale of intensity is no other phantom
    assert len({runs.folder_of(q, runs.Run("binary", "t1", "fedavg", 0)) for q in points}) == 6
    assert sweeps.dial_points(profile(tmp_path)) == []


def test_the_dials_table_has_each_arm_and_the_oracle_at_each_point_and_fold(tmp_path, monkeypatch):
    cases = {"case_id": [f"c{k}" for k in range(8)], "center": [*"AAAABBBB"], "y_true": [0, 1] * 4}
    frame = pd.DataFrame(cases | {"modality": "t1", "task": "binary", "seed": 0, "fold": [0, 0, 1, 1] * 2})
    oracle = frame.assign(arm="oracle", epoch=1, prob_0=0.5, prob_1=0.5)
    last = oracle.assign(arm="fedavg", epoch=2, prob_0=1 - frame["y_true"], prob_1=frame["y_true"])
    arm = pd.concat([oracle.assign(arm="fedavg"), last])
    monkeypatch.setattr(store, "predictions", lambda q, task: arm)
    monkeypatch.setattr(sweeps.data, "read_truth", lambda q: None)
    monkeypatch.setattr(sweeps.data, "open_cohort", lambda q: None)
    monkeypatch.setattr(sweeps.truth, "reference_arms", lambda *_: oracle)
    table = sweeps.dial_table(profile(tmp_path, dial_shifts=[0.0, 1.0]))
    assert len(table) == 2 * 2 * 2 and set(table["shift"]) == {0.0, 1.0} and set(table["fold"]) == {0, 1}
    assert table.groupby("arm")["within"].agg(list).to_dict() == {"fedavg": [1.0] * 4, "oracle": [0.5] * 4}


def test_points_of_seeds_train_the_binary_arms_of_the_last_modality_and_keep_no_weights(tmp_path):
    p = profile(tmp_path, modalities=["t1", "t2"], more_seeds=[1, 7])
    points = sweeps.seed_points(p)
    expected = [("t_seed1", 1, ("t2",)), ("t_seed7", 7, ("t2",))]
    assert [(q.profile, q.seed, q.modalities) for q in points] == expected
    assert not any(q.multiclass_models or q.keep_models for q in points)
    assert {q.phantom_seed for q in points} == {p.phantom_seed} and sweeps.seed_points(
        profile(tmp_path)
    ) == []


def test_spreads_over_seeds_and_over_folds_are_told_apart(tmp_path, monkeypatch):
    """AUC of a run is 1 - wrong / 16: four positive cases, four others, `wrong` pairs in the wrong order."""
    wrong = {0: {0: 0, 1: 4}, 1: {0: 2, 1: 6}}  # seed: fold: pairs; between seeds always 2, between folds 4

    def predictions(q, task):
        same = {
            "center": "A",
            "modality": "t1",
            "task": "binary",
            "arm": "fedavg",
            "seed": q.seed,
            "epoch": 1,
        }
        frames = []
        for fold, pairs in wrong[q.seed].items():
            low = 4.5 - pairs // 2  # two positives each lie below so many of the others
            prob = np.array([low, low, 9, 9, 1, 2, 3, 4]) / 10
            cases = {"case_id": [f"c{fold}{k}" for k in range(8)], "y_true": [1] * 4 + [0] * 4, "fold": fold}
            frames.append(pd.DataFrame(same | cases | {"prob_0": 1 - prob, "prob_1": prob}))
        return pd.concat(frames, ignore_index=True)

    monkeypatch.setattr(store, "predictions", predictions)
    table = sweeps.seed_table(profile(tmp_path, arms=["fedavg"], more_seeds=[1]))
    (row,) = table.itertuples()
    assert (row.seeds, row.folds) == (2, 2)
    assert row.auc == pytest.approx(1 - 3 / 16)
    assert row.over_seeds == pytest.approx(np.std([0, 2 / 16], ddof=1))
    assert row.over_folds == pytest.approx(np.std([0, 4 / 16], ddof=1))
