import itertools

import numpy as np
import pandas as pd
import pytest
from frames import random_run, rows

from ipmn_core import metrics
from ipmn_core.metrics import centers, inference
from ipmn_core.names import CENTERS

pytestmark = pytest.mark.filterwarnings("error")  # an undefined value is NaN, never a warning


def one(n_classes, seed=0, **names):
    return random_run(n_classes, epochs=1, n=150, folds=3, seed=seed, **names)


def count_pairs(frame, k, belongs):
    """Share in the right order, and number, of the pairs of one fold that `belongs` admits: plain loops."""
    right, total = 0.0, 0
    for a, b in itertools.product(frame.to_dict("records"), repeat=2):
        if a["y_true"] == k and b["y_true"] != k and a["fold"] == b["fold"] and belongs(a, b):
            right += (a[f"prob_{k}"] > b[f"prob_{k}"]) + 0.5 * (a[f"prob_{k}"] == b[f"prob_{k}"])
            total += 1
    return right / total, total


KINDS = {
    "pooled": lambda a, b: True,
    "within": lambda a, b: a["center"] == b["center"],
    "between": lambda a, b: a["center"] != b["center"],
}


@pytest.mark.parametrize("n_classes", [2, 3])
def test_every_value_is_the_mean_over_classes_of_the_pairs_counted_one_by_one(n_classes):
    frame, classes = one(n_classes), [1] if n_classes == 2 else range(3)
    row = centers.decompose(frame).iloc[0]
    counted = {kind: [count_pairs(frame, k, f) for k in classes] for kind, f in KINDS.items()}
    for kind, found in counted.items():
        assert row[kind] == pytest.approx(np.mean([share for share, _ in found]), abs=1e-15)  # of a mean
    pairs = {kind: [n for _, n in found] for kind, found in counted.items()}
    assert (row["pairs"], row["undefined"]) == (sum(pairs["pooled"]), "")
    shares = np.divide(pairs["within"], pairs["pooled"])
    assert row["share_within"] == pytest.approx(shares.mean(), abs=1e-15)
    if n_classes == 2:
        mixture = row["share_within"] * row["within"] + (1 - row["share_within"]) * row["between"]
        assert row["pooled"] == pytest.approx(mixture, abs=1e-12)  # float64 divisions
    table = centers.within_by_center(frame)
    assert table["center"].tolist() == list(CENTERS[:4])  # in their order
    for row in table.itertuples():
        here = frame[frame["center"] == row.center]
        counted = [count_pairs(here, k, KINDS["pooled"]) for k in classes]
        assert row.within == pytest.approx(np.mean([share for share, _ in counted]), abs=1e-12)  # of a mean
        assert row.pairs == sum(n for _, n in counted)


WITHIN, BETWEEN = "no pairs within a center", "no pairs between centers"


@pytest.mark.parametrize(
    ("y", "center", "fold", "defined", "reason"),
    [
        ([0, 0, 0, 0], "NYU", 0, [], "no positive case"),
        ([1, 1, 1, 1], "NYU", 0, [], "no negative case"),
        ([1, 1, 0, 0], "NYU", [0, 0, 1, 1], [], f"no pairs; {WITHIN}; {BETWEEN}"),
        ([1, 1, 0, 0], ["NYU", "NYU", "IU", "IU"], 0, ["between"], WITHIN),
        ([1, 1, 0, 0], "NYU", 0, ["within"], BETWEEN),
    ],
)
def test_a_value_without_pairs_is_nan_with_the_reason(y, center, fold, defined, reason):
    row = centers.decompose(rows(y, [0.9, 0.8, 0.7, 0.1], center, fold=fold)).iloc[0]
    assert row["undefined"] == reason
    assert np.isnan(row["pooled"]) != bool(defined)
    assert [kind for kind in ("within", "between") if not np.isnan(row[kind])] == defined


def test_one_class_without_pairs_leaves_the_mean_of_three_undefined():
    frame = rows([0, 1, 0, 2], np.full((4, 3), 1 / 3), ["NYU", "NYU", "IU", "EMC"], task="multiclass")
    row = centers.decompose(frame).iloc[0]
    assert row["pooled"] == pytest.approx(0.5, abs=1e-15) and np.isnan(row["within"])
    assert row["undefined"] == "no pairs within a center"
    table = centers.within_by_center(frame).set_index("center")
    assert table["within"].isna().all()
    assert table.loc["NYU", "undefined"] == "no case of class 2"
    assert table.loc["IU", "undefined"] == "no case of class 1 and no case of class 2"
    assert table["pairs"].tolist() == [2, 0, 0]


def test_tasks_modalities_and_arms_in_one_frame_are_each_measured_alone():
    parts = [one(2), one(2, seed=1, arm="centralized"), one(3, seed=2, arm="resnet34", modality="t1")]
    for measure in (centers.decompose, centers.within_by_center):
        together = measure(pd.concat(parts))
        pd.testing.assert_frame_equal(together, pd.concat(map(measure, parts), ignore_index=True))
        assert together["arm"].unique().tolist() == ["fedavg", "centralized", "resnet34"]


@pytest.fixture(scope="module")
def multiclasses():
    return random_run(3, n=48, folds=2, arm="resnet34", modality="t1")


def test_every_rule_is_that_of_metrics(multiclasses):
    selected = centers.by_rules(multiclasses, multiclasses)
    assert list(dict.fromkeys(selected["rule"])) == list(metrics.RULES)
    for rule, chosen in selected.groupby("rule"):
        expected = metrics.select(multiclasses, rule, multiclasses)
        pd.testing.assert_frame_equal(chosen.drop(columns="rule").reset_index(drop=True), expected)
    for validation in (None, multiclasses.iloc[:0]):
        assert set(centers.by_rules(multiclasses, validation)["rule"]) == {"best_test", "last"}


def test_the_summary_holds_the_numbers_of_inference_for_both_tasks(multiclasses, binary_predictions):
    selected = centers.by_rules(pd.concat([multiclasses, binary_predictions]))
    summary = centers.summary(selected, n_resamples=20)
    columns = [*metrics.ARM, "center", "mean", "low", "high"]
    for of, chosen in selected.groupby(["rule", "task"]):
        numbers = inference.intervals(chosen, 20)
        for metric in ("acc", "auc"):
            mine = summary[(summary[["rule", "task", "metric"]] == [*of, metric]).all(axis=1)]
            names = {metric: "mean", f"{metric}_low": "low", f"{metric}_high": "high"}
            expected = numbers.rename(columns=names)[columns]
            pd.testing.assert_frame_equal(mine[columns].reset_index(drop=True), expected)
    assert len(summary) == 2 * 2 * (5 + 2 * 2 * 4)  # metrics, rules, centers of the one arm, of the others


def values(*arms):
    """Predictions of some arms, whose scores differ, and of their inner validation."""
    tested = [one(2, seed=k, arm=arm) for k, arm in enumerate(arms)]
    inner = [one(2, seed=10 + k, arm=arm) for k, arm in enumerate(arms)]
    return pd.concat(tested, ignore_index=True), pd.concat(inner, ignore_index=True)


def test_inner_validation_chooses_a_strategys_value_in_each_fold():
    arms = ["fedavg", "fedprox_0.1", "fedprox_0.3", "ditto_1", "ditto_2", "fedadam_0.1"]
    tested, inner = values(*arms)
    tuned = centers.tuned(tested, inner)
    assert set(tuned["arm"]) == {"fedavg", "fedprox", "ditto", "fedadam_0.1"}  # one value is no choice
    for (family, fold), taken in tuned.groupby(["arm", "fold"]):
        mine = [arm for arm in arms if arm == family or arm.startswith(f"{family}_")]
        of = inner[inner["fold"] == fold]
        judged = [centers.decompose(of[of["arm"] == arm])["within"].iloc[0] for arm in mine]
        best = mine[int(np.argmax(judged))]
        assert set(taken["chosen"]) == {best}
        theirs = tested[(tested["arm"] == best) & (tested["fold"] == fold)]
        assert taken["prob_1"].tolist() == theirs["prob_1"].tolist()
    assert tuned.groupby("arm")["chosen"].nunique().max() > 1  # folds need not agree


def test_the_table_of_strategies_has_no_global_auc_of_personal_arms():
    tested, inner = values("fedavg", "fedprox_0.1", "fedprox_0.3", "ditto_1", "ditto_2", "scaffold")
    tuned = centers.tuned(tested, inner)
    table = centers.by_strategy(tuned).set_index("arm")
    assert table["auc_mean"].isna().to_dict() == {
        a: a == "ditto" for a in ("fedavg", "scaffold", "fedprox", "ditto")
    }
    assert table["within"].notna().all() and table.loc[["fedavg", "scaffold"], "chosen"].eq("").all()
    chosen = tuned[tuned["arm"] == "ditto"].groupby("fold")["chosen"].first()
    assert table.loc["ditto", "chosen"] == ", ".join(chosen.str.removeprefix("ditto_"))


def test_a_value_without_inner_validation_is_named():
    tested, inner = values("fedprox_0.1", "fedprox_0.3")
    with pytest.raises(ValueError, match=r"fedprox_0.3 has no inner validation: set inner_validation"):
        centers.tuned(tested, inner[inner["arm"] != "fedprox_0.3"])


def test_the_cross_site_matrix_against_pairs_counted_by_hand():
    y, at, fold = [1, 0, 1, 0, 1, 0, 0], [*"AAAABBC"], [0, 0, 1, 1, 0, 0, 0]
    by_model = {
        "A": [0.9, 0.1, 0.2, 0.8, 0.3, 0.3, 0.5],
        "B": [0.2, 0.6, 0.7, 0.1, 0.9, 0.4, 0.5],
        "C": [0.5, 0.5, 0.5, 0.5, 0.1, 0.9, 0.5],
    }
    made = [rows(y, prob, at, arm="local_only", fold=fold, epoch=2) for prob in by_model.values()]
    cross = pd.concat([of.assign(model_center=name) for of, name in zip(made, by_model, strict=True)])
    first, last = ([0.5] * 7, [0.9, 0.1, 0.9, 0.1, 0.2, 0.7, 0.5])
    predictions = pd.concat(
        [rows(y, prob, at, arm=arm, fold=fold, epoch=epoch)
         for arm in ("fedavg", "local_only") for epoch, prob in ((1, first), (2, last))]
    )  # fmt: skip
    table = centers.cross_site(cross, predictions).set_index(["trained_at", "center"])
    assert table["auc"].unstack("center").loc[["A", "B", "C", "global"], ["A", "B"]].to_numpy().tolist() == [
        [0.5, 0.5],  # at A a pair of each fold, never across: one won, one lost; at B a tie
        [0.5, 1.0],
        [0.5, 0.0],
        [1.0, 0.0],
    ]
    at_c = table.xs("C", level="center")
    assert at_c["auc"].isna().all() and set(at_c["undefined"]) == {"no positive case"}
    assert table.loc[("B", "A"), ["n", "positives", "pairs"]].tolist() == [4, 2, 2]
    assert table.loc["global", "over_own"].tolist()[:2] == [0.5, -1.0]
    assert table["arm"].loc["global"].tolist() == ["fedavg"] * 3  # no row for the arm of many models


def test_a_center_left_out_is_reported_at_an_epoch_that_it_did_not_choose():
    y, at = [1, 0, 1, 0, 0, 0], [*"AABBCC"]
    fold = ["ABC".index(c) for c in at]
    wrong, right = [0.1, 0.9, 0.9, 0.1, 0.4, 0.5], [0.9, 0.1, 0.9, 0.1, 0.4, 0.5]
    predictions = pd.concat(
        [rows(y, prob, at, fold=fold, epoch=e) for e, prob in enumerate((right, wrong), 1)]
    )
    table = centers.unseen(predictions).set_index("center")
    assert table.loc[["A", "B"], ["auc", "gained"]].to_numpy().tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert table["auc_best_test"]["A"] == 1.0 and table.loc["global", "gained"] == 0.5
    assert np.isnan(table["auc"]["C"]) and table["undefined"]["C"].startswith("no positive case in fold 2")
    assert table.loc["A", ["n", "positives", "acc"]].tolist() == [2, 1, 0.0]
    inner = pd.concat([rows(y[:2], prob[:2], "B", fold=k, epoch=e)
                       for k in range(3) for e, prob in enumerate((right, wrong), 1)])  # fmt: skip
    assert centers.unseen(predictions, inner).set_index("center")["auc"]["A"] == 1.0
