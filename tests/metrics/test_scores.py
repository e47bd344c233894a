import itertools

import numpy as np
import pandas as pd
import pytest
from frames import global_auc, random_run, rows
from sklearn.metrics import roc_auc_score

from ipmn_core import metrics
from ipmn_core.metrics import calibration, inference, scores


def pairwise_auc(positive, score):
    """Share of (positive, negative) pairs in the right order, ties one half: the definition itself."""
    pairs = list(itertools.product(score[positive], score[~positive]))
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_auc_agrees_with_scikit_learn_and_is_exactly_that_of_counted_pairs(seed):
    y, p = metrics.y_and_prob(random_run(2, epochs=1, seed=seed))
    assert metrics.auc(y, p) == pytest.approx(roc_auc_score(y, p[:, 1]), abs=1e-12)  # float64 sums
    assert metrics.auc(y, p) == pairwise_auc(y == 1, p[:, 1])
    y, p = metrics.y_and_prob(random_run(3, epochs=1, seed=seed, task="multiclass"))
    p /= p.sum(axis=1, keepdims=True)  # scikit-learn insists on rows that sum to one
    expected = roc_auc_score(y, p, multi_class="ovr", average="macro", labels=[0, 1, 2])
    assert metrics.auc(y, p) == pytest.approx(expected, abs=1e-12)


def test_accuracy_counts_the_most_probable_class_and_gives_a_tie_to_the_lower():
    assert metrics.accuracy([0, 1, 1, 1], np.array([[0.5, 0.5], [0.5, 0.5], [0.4, 0.6], [0.9, 0.1]])) == 0.5
    assert metrics.accuracy([2, 0], np.array([[0.2, 0.3, 0.5], [0.3, 0.4, 0.3]])) == 0.5


def test_a_diverged_run_is_refused_by_name():
    frame = random_run(2)
    frame.loc[100, ["prob_0", "prob_1"]] = np.nan
    with pytest.raises(ValueError, match=r"case_40 of binary/t2/fedavg/fold0, epoch 2.*diverged"):
        metrics.select(frame)
    with pytest.raises(ValueError, match="not finite"):
        metrics.y_and_prob(frame.assign(prob_0=np.nan, prob_1=np.nan))


def test_global_auc_pools_centers_instead_of_averaging_them():
    # each center is ranked perfectly, but the scales of the centers disagree
    y, p = [1, 0, 1, 0], [0.9, 0.8, 0.2, 0.1]
    fold = rows(y, p, center=["NYU", "NYU", "AHN", "AHN"])
    auc = metrics.by_fold(fold).set_index("center")["auc"]
    assert auc["NYU"] == auc["AHN"] == 1
    assert global_auc(fold) == auc["global"] == 0.75


def test_per_epoch_equals_the_auc_of_each_epoch_taken_alone():
    frame = pd.concat([random_run(2), random_run(3, seed=1), random_run(2, seed=2, fold=1)])
    table = scores.per_epoch(frame.sample(frac=1, random_state=0))  # row order must not matter
    assert list(table.columns) == [*metrics.RUN, "epoch", "acc", "auc"] and len(table) == 9
    for row in table.itertuples():
        alone = frame[(frame.task == row.task) & (frame.fold == row.fold) & (frame.epoch == row.epoch)]
        assert row.auc == global_auc(alone) and row.acc == metrics.accuracy(*metrics.y_and_prob(alone))


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.5, 0.7), (0.5, 0.8), (0.6, 0.7)], 2),  # the highest AUC
        ([(0.5, 0.8), (0.6, 0.8), (0.6, 0.8)], 3),  # of equals a later one of no lower ACC
        ([(0.6, 0.8), (0.5, 0.8)], 1),  # of a lower one not
        ([(0.5, 0.8), (0.9, 0.7), (0.6, 0.8)], 1),  # any epoch's ACC counts, also that of a lower AUC
        ([(0.5, np.nan), (0.4, np.nan)], 2),  # no AUC is defined: the last
    ],
)
def test_of_equal_aucs_a_later_epoch_counts_if_none_before_it_has_a_higher_accuracy(epochs, best):
    assert metrics.best_epoch((k, *pair) for k, pair in enumerate(epochs, 1)) == best


def test_the_epoch_of_highest_auc_is_selected_by_each_run_on_its_own():
    aucs = {0: [0, 1, 0], 1: [0, 1, 1], 2: [1, 0, 1]}
    frame = [
        rows([1, 0], [0.2, 0.8] if auc == 0 else [0.8, 0.2], fold=fold, epoch=epoch)
        for fold, values in aucs.items()
        for epoch, auc in enumerate(values, 1)
    ]
    frame += [rows([0, 0], [0.2, 0.8], fold=3, epoch=epoch) for epoch in (1, 2)]  # no AUC: the last
    frame = pd.concat(frame, ignore_index=True)
    for rule, epochs in (("best_test", [2, 3, 3, 2]), ("last", [3, 3, 3, 2])):
        assert metrics.select(frame, rule)["epoch"].tolist() == np.repeat(epochs, 2).tolist()
    with pytest.raises(ValueError, match="best_test, best_inner, last"):
        metrics.select(frame, "best_validation")


def test_best_inner_selects_by_the_held_out_cases_and_reports_the_test_cases():
    test = pd.concat([rows([1, 0], p, epoch=e) for e, p in enumerate([[0.9, 0.1], [0.1, 0.9]], 1)])
    inner = pd.concat([rows([1, 0], p, epoch=e) for e, p in enumerate([[0.1, 0.9], [0.9, 0.1]], 1)])
    chosen = metrics.select(test, "best_inner", inner.assign(case_id=["a", "b", "a", "b"]))
    assert chosen["epoch"].tolist() == [2, 2] and chosen["case_id"].tolist() == ["case_0", "case_1"]
    for nothing in (None, inner.assign(fold=1)):
        with pytest.raises(ValueError, match=r"binary/t2/fedavg/fold0 has no inner validation"):
            metrics.select(test, "best_inner", nothing)


def test_optimism_is_what_choosing_on_the_test_fold_adds():
    test, inner = random_run(2), random_run(2, seed=1)
    row = metrics.optimism(test, inner).iloc[0]
    auc, inner_auc = scores.per_epoch(test)["auc"], scores.per_epoch(inner)["auc"]  # one fold
    chosen = [auc.max(), auc[inner_auc.idxmax()], auc.iloc[-1]]
    assert row[["best_test", "best_inner", "last"]].tolist() == chosen
    differences = row[["peak_minus_inner", "peak_minus_last"]].tolist()
    assert differences == [chosen[0] - chosen[1], chosen[0] - chosen[2]]
    assert (row["epochs"], row["undefined"]) == (3, "")
    without = metrics.optimism(test)
    assert without[["best_inner", "peak_minus_inner"]].isna().all(axis=None)
    assert without["undefined"].tolist() == ["no inner validation split"]


def test_by_fold_lists_every_center_and_global_whose_accuracy_weights_centers_by_their_images():
    table = metrics.by_fold(rows([1, 0, 1, 0], [0.9, 0.2, 0.8, 0.6], ["NYU", "NYU", "NYU", "AHN"], fold=3))
    assert list(table.columns) == [*metrics.RUN, "center", "n", "positives", "acc", "auc", "undefined"]
    assert table["center"].tolist() == ["NYU", "AHN", "global"]
    assert table[["n", "positives", "acc"]].to_numpy().tolist() == [[3, 2, 1], [1, 0, 0], [4, 2, 0.75]]
    assert table["auc"].isna().tolist() == [False, True, False]
    assert table["undefined"].tolist() == ["", "no positive case", ""]


def folds_of(acc, auc):
    keys = {"task": "binary", "modality": "t1", "arm": "centralized", "center": "AHN"}
    why = ["no positive case" if np.isnan(value) else "" for value in auc]
    return pd.DataFrame({"fold": range(len(acc)), "acc": acc, "auc": auc, "undefined": why}).assign(**keys)


def test_deviation_over_folds_divides_by_their_number_as_only_that_gives_the_papers_ahn():
    row = metrics.over_folds(folds_of([1, 0.75, 1, 0.75], [1, 0, 2 / 3, 1])).iloc[0]
    assert (row["acc_mean"], row["acc_std"]) == (0.875, 0.125)  # table 3: 0.8750 +/- 0.1250
    assert (round(row["auc_mean"], 4), round(row["auc_std"], 4)) == (0.6667, 0.4082)  # table 3, too


def test_undefined_folds_are_left_out_of_the_auc_and_counted():
    row = metrics.over_folds(folds_of([1, 0.5, 1, 0.5], [np.nan, 0.5, 1, np.nan])).iloc[0]
    assert (row["auc_mean"], row["auc_std"], row["folds"], row["auc_folds"]) == (0.75, 0.25, 4, 2)
    assert row["undefined"] == "no positive case in fold 0, 3"
    row = metrics.over_folds(folds_of([1, 0.5], [np.nan, np.nan])).iloc[0]
    assert np.isnan([row["auc_mean"], row["auc_std"]]).all() and row["auc_folds"] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.drop(columns=["fold", "prob_1"]), "no column fold, prob_1"),
        (
            lambda f: pd.concat([f, f.iloc[[7]]]),
            r"row 180 \(case case_7 of binary/t2/fedavg/fold0, epoch 1\)",
        ),
        (lambda f: f.assign(prob_0=f["prob_0"].where(f.index != 61, 0.98)), r"61 \(case case_1 .*sum to 1"),
        (lambda f: f.assign(prob_1=f["prob_1"].where(f.index != 5)), r"row 5 .* between 0 and 1"),
        (lambda f: f.assign(prob_0=f["prob_0"] + 1, prob_1=f["prob_1"] - 1), r"row 0 .* between 0 and 1"),
        (lambda f: f.assign(y_true=2), r"row 0 .*label is no class"),
        (lambda f: f.assign(y_true=f["y_true"] ^ (f.index == 60)), r"row 60 .*has another label"),
        (lambda f: f.assign(center=f["center"].where(f.index != 9)), r"row 9 .*a cell is empty"),
        (lambda f: f.assign(fold=[0] * 90 + [1] * 90), r"row 90 .*tested in two folds"),
    ],
)
def test_invalid_predictions_are_refused_with_the_row(spoil, message):
    with pytest.raises(metrics.PredictionsError, match=message):
        metrics.check(spoil(random_run(2)))


def test_valid_predictions_of_both_tasks_come_back_and_a_case_that_was_trained_on_is_refused():
    three = random_run(3)
    prob = three.filter(like="prob_")
    three[list(prob)] = prob.div(prob.sum(axis=1), axis=0)
    both = pd.concat([random_run(2), three], ignore_index=True)
    assert metrics.check(both) is both
    with pytest.raises(metrics.PredictionsError, match=r"file x, row 3 \(case case_3 .* was trained on"):
        metrics.check(both, ["case_3", "other"], "file x")


@pytest.mark.parametrize("function", [metrics.by_fold, inference.compare_arms, calibration.table])
def test_a_run_of_several_epochs_is_refused_by_name(function):
    with pytest.raises(ValueError, match=r"t2/fedavg/fold0 has several epochs: apply `metrics.select`"):
        function(random_run(2))
