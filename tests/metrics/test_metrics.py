import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ipmn_core import metrics

CENTERS = ["NYU", "MCF", "NU", "AHN", "MCA", "IU", "EMC"]


def predictions(y, prob, center="NYU", task="binary", modality="t2", arm="fedavg", fold=0, epoch=1):
    """Rows of one epoch; center may be one name or one a case."""
    prob = np.asarray(prob, dtype=float)
    prob = np.column_stack([1 - prob, prob]) if prob.ndim == 1 else prob
    frame = pd.DataFrame(
        {"case_id": [f"case_{i}" for i in range(len(y))], "center": center, "modality": modality}
    )
    frame = frame.assign(task=task, arm=arm, fold=fold, seed=0, epoch=epoch, y_true=np.asarray(y))
    return frame.assign(**{f"prob_{k}": prob[:, k] for k in range(prob.shape[1])})


def random_run(n_classes, epochs=3, n=60, seed=0, **run):
    rng = np.random.default_rng(seed)
    y, center = rng.integers(0, n_classes, n), rng.choice(CENTERS, n)
    # two decimals: plenty of ties
    draws = [rng.dirichlet(np.ones(n_classes), n).round(2) for _ in range(epochs)]
    return pd.concat(
        [predictions(y, p, center, epoch=e, **run) for e, p in enumerate(draws, 1)], ignore_index=True
    )


def global_accuracy(fold_frame):
    """The paper's definition: accuracies of the centers, each weighted by its number of test images."""
    centers = [
        (metrics.accuracy(*metrics.y_and_prob(rows)), len(rows)) for _, rows in fold_frame.groupby("center")
    ]
    return float(np.average([acc for acc, _ in centers], weights=[n for _, n in centers]))


def global_auc(fold_frame):
    """AUC of one fold's test cases, scores pooled over centers."""
    return metrics.auc(*metrics.y_and_prob(fold_frame))


def pairwise_auc(positive, score):
    """Share of (positive, negative) pairs in the right order, ties one half: the definition itself."""
    pairs = list(itertools.product(score[positive], score[~positive]))
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


def test_binary_auc_with_ties_equals_the_value_counted_by_hand():
    # positives 0.8, 0.5; negatives 0.5, 0.5, 0.1: pairs 3 won by 0.8, then 0.5 + 0.5 + 1 for 0.5
    y, p = np.array([1, 1, 0, 0, 0]), np.array([0.8, 0.5, 0.5, 0.5, 0.1])
    assert metrics.auc(y, np.column_stack([1 - p, p])) == 5 / 6


def test_macro_one_vs_rest_auc_equals_the_value_counted_by_hand():
    y = np.array([0, 1, 2, 2])
    prob = np.array([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7], [0.7, 0.1, 0.2]])
    # class 0: 0.6 beats 0.5, 0.1, not 0.7: 2/3. Class 1: 0.2 loses to 0.3, ties 0.2, beats 0.1: 1/2.
    # class 2: 0.7 beats both, 0.2 beats 0.1 only: 3/4
    assert metrics.auc(y, prob) == pytest.approx(
        (2 / 3 + 1 / 2 + 3 / 4) / 3, abs=1e-15
    )  # rounding of the mean


@pytest.mark.parametrize("seed", range(5))
def test_auc_agrees_with_scikit_learn_and_with_counting_pairs(seed):
    y, p = metrics.y_and_prob(random_run(2, epochs=1, seed=seed))
    assert metrics.auc(y, p) == pytest.approx(roc_auc_score(y, p[:, 1]), abs=1e-12)  # float64 sums
    assert metrics.auc(y, p) == pairwise_auc(y == 1, p[:, 1])
    y, p = metrics.y_and_prob(random_run(3, epochs=1, seed=seed, task="three_class"))
    p /= p.sum(axis=1, keepdims=True)  # scikit-learn insists on rows that sum to one
    expected = roc_auc_score(y, p, multi_class="ovr", average="macro", labels=[0, 1, 2])
    assert metrics.auc(y, p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("y", "n_classes"), [([0, 0, 0], 2), ([1, 1, 1], 2), ([1, 2, 1], 3), ([2, 2, 2], 3)])
def test_auc_without_every_class_is_nan_and_silent(y, n_classes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(metrics.auc(np.array(y), np.full((3, n_classes), 1 / n_classes)))


def test_accuracy_counts_the_most_probable_class_and_gives_a_tie_to_the_lower():
    assert metrics.accuracy([0, 1, 1, 1], np.array([[0.5, 0.5], [0.5, 0.5], [0.4, 0.6], [0.9, 0.1]])) == 0.5
    assert metrics.accuracy([2, 0], np.array([[0.2, 0.3, 0.5], [0.3, 0.4, 0.3]])) == 0.5


def test_scores_ignore_the_column_that_only_the_other_task_fills():
    both = pd.concat([random_run(2), random_run(3, task="three_class")])
    assert metrics.y_and_prob(both[both["task"] == "binary"])[1].shape == (180, 2)
    assert metrics.y_and_prob(both[both["task"] == "three_class"])[1].shape == (180, 3)
    with pytest.raises(ValueError, match="several tasks"):
        metrics.y_and_prob(both)


def test_a_diverged_run_is_refused_by_name():
    frame = random_run(2)
    frame.loc[100, ["prob_0", "prob_1"]] = np.nan
    with pytest.raises(ValueError, match=r"case_40 of binary/t2/fedavg/fold0, epoch 2.*diverged"):
        metrics.per_epoch(frame)
    with pytest.raises(ValueError, match="not finite"):
        metrics.y_and_prob(frame.assign(prob_0=np.nan, prob_1=np.nan))


def test_global_accuracy_weights_centers_by_their_images_and_so_equals_the_pooled_accuracy():
    fold = predictions([1, 1, 1, 0], [0.9, 0.9, 0.1, 0.9], center=["NYU", "NYU", "NYU", "AHN"])
    assert global_accuracy(fold) == (2 / 3 * 3 + 0 * 1) / 4
    fold = random_run(3, epochs=1, n=137, task="three_class")
    assert global_accuracy(fold) == pytest.approx(metrics.accuracy(*metrics.y_and_prob(fold)), abs=1e-12)


def test_global_auc_pools_centers_instead_of_averaging_them():
    # each center is ranked perfectly, but the scales of the centers disagree
    y, p = [1, 0, 1, 0], [0.9, 0.8, 0.2, 0.1]
    fold = predictions(y, p, center=["NYU", "NYU", "AHN", "AHN"])
    rows = metrics.by_fold(fold).set_index("center")["auc"]
    assert rows["NYU"] == rows["AHN"] == 1
    assert global_auc(fold) == rows["global"] == 0.75


def test_per_epoch_equals_the_metrics_of_each_epoch_taken_alone():
    frame = pd.concat(
        [random_run(2), random_run(3, task="three_class", seed=1), random_run(2, seed=2, fold=1)]
    )
    table = metrics.per_epoch(frame.sample(frac=1, random_state=0))  # row order must not matter
    assert list(table.columns) == [*metrics.RUN, "epoch", "acc", "auc", "n"]
    assert len(table) == 9
    for row in table.itertuples():
        rows = frame[(frame.task == row.task) & (frame.fold == row.fold) & (frame.epoch == row.epoch)]
        assert row.n == 60
        assert row.auc == pytest.approx(global_auc(rows), abs=1e-12)  # order of summation
        assert row.acc == pytest.approx(global_accuracy(rows), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([[0.2, 0.8], [0.8, 0.2], [0.2, 0.8]], 2),  # the highest AUC
        ([[0.2, 0.8], [0.8, 0.2], [0.9, 0.1]], 2),  # the earliest of two that are equal
    ],
)
def test_best_test_selects_the_earliest_epoch_of_highest_auc_and_last_the_last(scores, best):
    run = pd.concat([predictions([1, 0], p, epoch=e) for e, p in enumerate(scores, 1)], ignore_index=True)
    assert metrics.select(run)["epoch"].tolist() == [best, best]
    assert metrics.select(run, "last")["epoch"].tolist() == [3, 3]


def test_selection_falls_back_on_the_last_epoch_where_no_auc_is_defined():
    run = pd.concat([predictions([0, 0], [0.2, 0.8], epoch=epoch) for epoch in (1, 2, 3)])
    assert set(metrics.select(run)["epoch"]) == {3}


def test_every_run_has_its_own_selected_epoch():
    worse, better = predictions([1, 0], [0.1, 0.9]), predictions([1, 0], [0.9, 0.1])
    frame = pd.concat([better, worse.assign(epoch=2), worse.assign(fold=1), better.assign(fold=1, epoch=2)])
    assert metrics.select(frame).groupby("fold")["epoch"].unique().str[0].to_dict() == {0: 1, 1: 2}
    with pytest.raises(ValueError, match="best_test, best_inner, last"):
        metrics.select(frame, "best_validation")


def test_by_fold_lists_every_center_and_global_with_undefined_auc_as_nan():
    fold = predictions([1, 0, 0, 0], [0.9, 0.2, 0.6, 0.1], center=["NYU", "NYU", "AHN", "AHN"], fold=3)
    table = metrics.by_fold(fold)
    assert list(table.columns) == [*metrics.RUN, "center", "n", "positives", "acc", "auc", "undefined"]
    assert table["center"].tolist() == ["NYU", "AHN", "global"]
    assert table["n"].tolist() == [2, 2, 4]
    assert table["positives"].tolist() == [1, 0, 1]
    assert table["acc"].tolist() == [1, 0.5, 0.75]
    assert table["auc"].isna().tolist() == [False, True, False]
    assert table["undefined"].tolist() == ["", "no high-risk case", ""]


def test_positives_of_three_classes_are_the_high_risk_cases_even_where_a_center_has_none():
    prob = np.full((4, 3), 1 / 3)
    fold = predictions([2, 1, 1, 0], prob, center=["NYU", "NYU", "IU", "IU"], task="three_class")
    assert metrics.by_fold(fold)["positives"].tolist() == [1, 0, 1]


def test_by_fold_refuses_unselected_predictions():
    with pytest.raises(
        ValueError, match=r"binary/t2/fedavg/fold0 has several epochs: apply `metrics.select`"
    ):
        metrics.by_fold(random_run(2))


def folds_of(acc, auc):
    keys = {"task": "binary", "modality": "t1", "arm": "centralized", "center": "AHN"}
    why = ["no high-risk case" if np.isnan(value) else "" for value in auc]
    return pd.DataFrame({"fold": range(len(acc)), "acc": acc, "auc": auc, "undefined": why}).assign(**keys)


def test_deviation_over_folds_divides_by_their_number_as_only_that_gives_the_papers_ahn():
    row = metrics.over_folds(folds_of([1, 0.75, 1, 0.75], [1, 0, 2 / 3, 1])).iloc[0]
    assert (row["acc_mean"], row["acc_std"]) == (0.875, 0.125)  # table 3: 0.8750 +/- 0.1250
    assert round(row["auc_mean"], 4) == 0.6667
    assert round(row["auc_std"], 4) == 0.4082  # table 3, too


def test_undefined_folds_are_left_out_of_the_auc_and_counted():
    row = metrics.over_folds(folds_of([1, 0.5, 1, 0.5], [np.nan, 0.5, 1, np.nan])).iloc[0]
    assert (row["auc_mean"], row["auc_std"], row["folds"], row["auc_folds"]) == (0.75, 0.25, 4, 2)
    assert row["undefined"] == "no high-risk case in fold 0, 3"
    row = metrics.over_folds(folds_of([1, 0.5], [np.nan, np.nan])).iloc[0]
    assert np.isnan(row["auc_mean"])
    assert np.isnan(row["auc_std"])
    assert row["auc_folds"] == 0


def test_both_tasks_in_one_frame_are_measured_each_with_its_own_classes():
    both = pd.concat([random_run(2), random_run(3, task="three_class")])
    assert both.loc[both["task"] == "binary", "prob_2"].isna().all()
    apart = [metrics.by_fold(metrics.select(rows)) for _, rows in both.groupby("task")]
    together = metrics.by_fold(metrics.select(both)).sort_values("task", kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(together, pd.concat(apart, ignore_index=True))


def test_every_absent_class_is_named():
    assert metrics.scores.absent_classes([0, 0], 2) == "no high-risk case"
    assert metrics.scores.absent_classes([1, 1], 2) == "no other case"
    assert metrics.scores.absent_classes([1, 1], 3) == "no no-risk and no high-risk case"
    assert metrics.scores.absent_classes([2, 1, 0], 3) == ""


def test_best_inner_selects_by_the_held_out_cases_and_reports_the_test_cases():
    test = pd.concat([predictions([1, 0], p, epoch=e) for e, p in enumerate([[0.9, 0.1], [0.1, 0.9]], 1)])
    inner = pd.concat([predictions([1, 0], p, epoch=e) for e, p in enumerate([[0.1, 0.9], [0.9, 0.1]], 1)])
    chosen = metrics.select(test, "best_inner", inner.assign(case_id=["a", "b", "a", "b"]))
    assert chosen["epoch"].tolist() == [2, 2]
    assert chosen["case_id"].tolist() == ["case_0", "case_1"]
    for nothing in (None, inner.assign(fold=1)):
        with pytest.raises(ValueError, match=r"binary/t2/fedavg/fold0 has no inner validation"):
            metrics.select(test, "best_inner", nothing)


def test_optimism_is_what_choosing_on_the_test_fold_adds():
    test, inner = random_run(2), random_run(2, seed=1)
    row = metrics.optimism(test, inner).iloc[0]
    epochs, inner_epochs = metrics.per_epoch(test), metrics.per_epoch(inner)  # one fold
    assert row["best_test"] == pytest.approx(epochs["auc"].max())
    assert row["best_inner"] == pytest.approx(epochs["auc"][inner_epochs["auc"].idxmax()])
    assert row["last"] == pytest.approx(epochs["auc"].iloc[-1])
    assert row["peak_minus_last"] == pytest.approx(row["best_test"] - row["last"])
    assert row["peak_minus_inner"] == pytest.approx(row["best_test"] - row["best_inner"])
    assert (row["epochs"], row["undefined"]) == (3, "")
    without = metrics.optimism(test)
    assert without[["best_inner", "peak_minus_inner"]].isna().all(axis=None)
    assert without["undefined"].tolist() == ["no inner validation split"]


def test_selection_among_epochs_of_pure_noise_is_optimistic_and_the_inner_one_is_not():
    # 40 folds of noise: the best of 10 epochs lies well above chance, the inner choice's mean error is 0.01
    test = pd.concat([random_run(2, epochs=10, n=60, seed=k, fold=k) for k in range(40)])
    inner = pd.concat([random_run(2, epochs=10, n=60, seed=1000 + k, fold=k) for k in range(40)])
    row = metrics.optimism(test, inner).iloc[0]
    assert row["best_test"] > 0.58
    assert abs(row["best_inner"] - 0.5) < 0.04 and abs(row["last"] - 0.5) < 0.04


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.drop(columns=["fold", "prob_1"]), "no column fold, prob_1"),
        (
            lambda f: pd.concat([f, f.iloc[[7]]]),
            r"row 180 \(case case_7 of binary/t2/fedavg/fold0, epoch 1\)",
        ),
        (
            lambda f: f.assign(prob_0=f["prob_0"].where(f.index != 61, 0.99)),
            r"row 61 \(case case_1 .*sum to 1",
        ),
        (lambda f: f.assign(prob_1=f["prob_1"].where(f.index != 5)), r"row 5 .* between 0 and 1"),
        (lambda f: f.assign(prob_0=f["prob_0"] + 1, prob_1=f["prob_1"] - 1), r"row 0 .* between 0 and 1"),
        (lambda f: f.assign(y_true=2), r"row 0 .*label is no class"),
        (
            lambda f: f.assign(y_true=f["y_true"] ^ (f.index == 60)),
            r"row 60 .*has another label in an earlier row",
        ),
        (lambda f: f.assign(center=f["center"].where(f.index != 9)), r"row 9 .*a cell is empty"),
        (lambda f: f.assign(task="three_class"), "no column prob_2"),
        (lambda f: f.assign(fold=[0] * 90 + [1] * 90), r"row 90 .*tested in two folds"),
    ],
)
def test_predictions_that_cannot_be_right_are_refused_with_the_row(spoil, message):
    good = random_run(2)
    assert metrics.check(good) is good
    with pytest.raises(metrics.PredictionsError, match=message):
        metrics.check(spoil(good))


def test_a_case_that_was_trained_on_is_refused_with_its_row():
    with pytest.raises(metrics.PredictionsError, match=r"file x, row 3 \(case case_3 .* was trained on"):
        metrics.check(random_run(2), ["case_3", "other"], "file x")


def test_both_tasks_pass_the_check_in_one_frame():
    three = random_run(3, task="three_class")
    three[["prob_0", "prob_1", "prob_2"]] /= (
        three[["prob_0", "prob_1", "prob_2"]].sum(axis=1).to_numpy()[:, None]
    )
    metrics.check(pd.concat([random_run(2), three], ignore_index=True))
