"""Other training seeds: profiles of their own, and two spreads that add nothing to each other."""

import numpy as np
import pandas as pd
import pytest
from small_profile import profile

from ipmn_core.runs import seeds, store


def test_points_train_the_binary_arms_of_the_last_modality_and_keep_no_weights(tmp_path):
    p = profile(tmp_path, modalities=["t1", "t2"], more_seeds=[1, 7])
    points = seeds.points(p)
    assert [(q.profile, q.seed, q.modalities) for q in points] == [
        ("t_seed1", 1, ("t2",)),
        ("t_seed7", 7, ("t2",)),
    ]
    assert not any(q.multiclass_models or q.keep_models for q in points)
    assert {q.phantom_seed for q in points} == {p.phantom_seed} and seeds.points(profile(tmp_path)) == []


def test_spreads_over_seeds_and_over_folds_are_told_apart(tmp_path, monkeypatch):
    """AUC of a run is 1 - wrong / 16: four positive cases, four others, `wrong` pairs in the wrong order."""
    wrong = {0: {0: 0, 1: 4}, 1: {0: 2, 1: 6}}  # seed: fold: pairs; between seeds always 2, between folds 4

    def predictions(q, task):
        rows = []
        for fold, pairs in wrong[q.seed].items():
            above = [pairs // 2] * 2  # two positives each lie below so many of the others
            score = [*(4.5 - n for n in above), 9.0, 9.0, 1.0, 2.0, 3.0, 4.0]
            for k, value in enumerate(score):
                prob = value / 10
                rows.append(
                    (
                        f"c{fold}{k}",
                        "A",
                        "t1",
                        "binary",
                        "fedavg",
                        fold,
                        q.seed,
                        1,
                        int(k < 4),
                        1 - prob,
                        prob,
                    )
                )
        names = ["case_id", "center", "modality", "task", "arm", "fold", "seed", "epoch", "y_true"]
        return pd.DataFrame(rows, columns=[*names, "prob_0", "prob_1"])

    monkeypatch.setattr(store, "predictions", predictions)
    table = seeds.table(profile(tmp_path, arms=["fedavg"], more_seeds=[1]))
    (row,) = table.itertuples()
    assert (row.seeds, row.folds) == (2, 2)
    assert row.auc == pytest.approx(1 - 3 / 16)
    assert row.over_seeds == pytest.approx(np.std([0, 2 / 16], ddof=1))
    assert row.over_folds == pytest.approx(np.std([0, 4 / 16], ddof=1))
