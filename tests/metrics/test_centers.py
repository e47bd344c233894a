import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from test_metrics import global_auc

from ipmn_core.metrics import centers
from ipmn_core.names import CENTERS

ARM = ["task", "modality", "arm"]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(y, prob, center="NYU", fold=0, task="binary", modality="t2", arm="fedavg"):
    """One epoch's rows; prob is of class 1 or (N, K)."""
    prob = np.asarray(prob, dtype=float)
    prob = np.column_stack([1 - prob, prob]) if prob.ndim == 1 else prob
    frame = pd.DataFrame({"case_id": [f"case_{i}" for i in range(len(y))], "center": center, "fold": fold})
    frame = frame.assign(task=task, modality=modality, arm=arm, seed=0, epoch=1, y_true=np.asarray(y))
    return frame.assign(**{f"prob_{k}": prob[:, k] for k in range(prob.shape[1])})


def random_run(n_classes, n=150, n_folds=3, seed=0, **names):
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.ones(n_classes), n).round(1)  # one decimal: plenty of ties
    folds, centers = rng.integers(0, n_folds, n), rng.choice(CENTERS[:4], n)
    return run(rng.integers(0, n_classes, n), prob, centers, folds, **names)


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


@pytest.mark.parametrize("seed", range(3))
def test_every_value_equals_the_pairs_counted_one_by_one(seed):
    frame = random_run(2, seed=seed)
    row = centers.decompose(frame).iloc[0]
    counted = {kind: count_pairs(frame, 1, belongs) for kind, belongs in KINDS.items()}
    for kind, (share, _) in counted.items():
        assert row[kind] == share  # halves sum exactly
    assert row["pairs"] == counted["pooled"][1]
    assert row["share_within"] == counted["within"][1] / counted["pooled"][1]
    assert row["undefined"] == ""


def test_pooled_is_the_mixture_of_within_and_between():
    for row in centers.decompose(random_run(2, seed=4)).itertuples():
        mixture = row.share_within * row.within + (1 - row.share_within) * row.between
        assert row.pooled == pytest.approx(mixture, abs=1e-12)  # float64 divisions


def test_three_classes_are_the_mean_over_classes_against_the_rest():
    frame = random_run(3, task="three_class")
    row = centers.decompose(frame).iloc[0]
    counted = {kind: [count_pairs(frame, k, f) for k in range(3)] for kind, f in KINDS.items()}
    for kind, classes in counted.items():
        assert row[kind] == pytest.approx(np.mean([share for share, _ in classes]), abs=1e-12)  # of a mean
    pairs = {kind: [n for _, n in classes] for kind, classes in counted.items()}
    assert row["pairs"] == sum(pairs["pooled"])
    shares = np.divide(pairs["within"], pairs["pooled"])
    assert row["share_within"] == pytest.approx(shares.mean(), abs=1e-12)


@pytest.mark.parametrize(("n_classes", "task"), [(2, "binary"), (3, "three_class")])
def test_pooled_of_one_fold_is_its_global_auc(n_classes, task):
    frame = random_run(n_classes, n_folds=1, task=task)
    row = centers.decompose(frame).iloc[0]
    assert row["pooled"] == pytest.approx(global_auc(frame), abs=1e-12)  # ranks against pairs


def test_a_fold_counts_by_its_pairs():
    small = run([1, 0], [0.1, 0.9], fold=0)  # 1 pair, wrong
    large = run([1, 1, 0, 0, 0], [0.9, 0.8, 0.1, 0.2, 0.3], fold=1)  # 6 pairs, all right
    assert centers.decompose(pd.concat([small, large])).loc[0, "pooled"] == 6 / 7  # the mean of folds is 1/2


def test_scores_that_are_the_centers_prevalence_order_no_pair_within_a_center():
    rng = np.random.default_rng(0)
    center = rng.choice(CENTERS, 300)
    prevalence = dict(zip(CENTERS, np.linspace(0.1, 0.7, 7), strict=True))
    p = np.array([prevalence[c] for c in center])
    frame = run((rng.random(300) < p).astype(int), p, center, rng.integers(0, 4, 300))
    row = centers.decompose(frame).iloc[0]
    assert row["within"] == 0.5
    assert row["between"] > row["pooled"] > 0.6
    assert (centers.within_by_center(frame)["within"] == 0.5).all()


def test_knowing_the_disease_but_not_the_centers_scale_shows_within_only():
    frame = run([1, 0, 1, 0], [0.9, 0.8, 0.2, 0.1], ["NYU", "NYU", "IU", "IU"])
    row = centers.decompose(frame).iloc[0]
    assert (row["within"], row["between"], row["share_within"], row["pairs"]) == (1, 0.5, 0.5, 4)


@pytest.mark.parametrize(("n_classes", "task"), [(2, "binary"), (3, "three_class")])
def test_a_center_is_its_own_pairs_over_folds(n_classes, task):
    frame = random_run(n_classes, task=task)
    table = centers.within_by_center(frame)
    assert table["center"].tolist() == list(CENTERS[:4])  # in their order
    for row in table.itertuples():
        here = frame[frame["center"] == row.center]
        counted = [count_pairs(here, k, KINDS["pooled"]) for k in ([1] if n_classes == 2 else range(3))]
        assert row.within == pytest.approx(np.mean([share for share, _ in counted]), abs=1e-12)  # of a mean
        assert row.pairs == sum(n for _, n in counted)
        assert row.positives == (here["y_true"] == n_classes - 1).sum()


def test_centers_weighted_by_their_pairs_give_within():
    frame = random_run(2)
    mine = centers.within_by_center(frame)
    weighted = np.average(mine["within"], weights=mine["pairs"])
    assert centers.decompose(frame).loc[0, "within"] == pytest.approx(weighted, abs=1e-12)  # float64 sums


@pytest.mark.parametrize(
    ("y", "center", "fold", "defined", "reason"),
    [
        ([0, 0, 0, 0], "NYU", 0, "", "no high-risk case"),
        ([1, 1, 1, 1], "NYU", 0, "", "only high-risk cases"),
        ([1, 1, 0, 0], "NYU", [0, 0, 1, 1], "", "no fold has both high-risk and other cases"),
        ([1, 1, 0, 0], ["NYU", "NYU", "IU", "IU"], 0, "between", "no center has both high-risk and other"),
        ([1, 1, 0, 0], "NYU", 0, "within", "all pairs of high-risk and other cases are of one center"),
    ],
)
def test_a_value_without_pairs_is_nan_with_the_reason(y, center, fold, defined, reason):
    row = centers.decompose(run(y, [0.9, 0.8, 0.7, 0.1], center, fold)).iloc[0]
    assert row["undefined"].startswith(reason)
    assert np.isnan(row["pooled"]) != bool(defined)
    assert [kind for kind in ("within", "between") if not np.isnan(row[kind])] == (
        [defined] if defined else []
    )


def test_one_class_without_pairs_leaves_the_mean_of_three_undefined():
    prob = np.full((4, 3), 1 / 3)
    frame = run([0, 1, 0, 2], prob, ["NYU", "NYU", "IU", "EMC"], task="three_class")
    row = centers.decompose(frame).iloc[0]
    assert row["pooled"] == pytest.approx(0.5, abs=1e-15)
    assert np.isnan(row["within"])
    assert row["undefined"] == "no center has both high-risk and other cases in one fold"
    table = centers.within_by_center(frame).set_index("center")
    assert table["within"].isna().all()
    assert table.loc["NYU", "undefined"] == "no high-risk case"
    assert table.loc["IU", "undefined"] == "only no-risk cases; no low-risk case; no high-risk case"
    assert table["pairs"].tolist() == [2, 0, 0]
    assert table["positives"].tolist() == [0, 0, 1]


def test_a_center_without_pairs_is_listed_with_the_reason():
    frame = run([1, 0, 0, 1], [0.9, 0.1, 0.5, 0.5], ["EMC", "EMC", "NYU", "MCF"])
    table = centers.within_by_center(frame)
    assert table["center"].tolist() == ["NYU", "MCF", "EMC"]
    assert table["undefined"].tolist() == ["no high-risk case", "only high-risk cases", ""]
    assert table["within"].isna().tolist() == [True, True, False]


def test_tasks_modalities_and_arms_in_one_frame_are_each_measured_alone():
    parts = [
        random_run(2, arm="fedavg"),
        random_run(2, arm="centralized", seed=1),
        random_run(3, arm="resnet34", task="three_class", modality="t1", seed=2),
    ]
    for measure in (centers.decompose, centers.within_by_center):
        together = measure(pd.concat(parts))
        pd.testing.assert_frame_equal(together, pd.concat(map(measure, parts), ignore_index=True))
        assert together["arm"].unique().tolist() == ["fedavg", "centralized", "resnet34"]
        shuffled = measure(pd.concat(parts).sample(frac=1, random_state=0)).sort_values(ARM, kind="stable")
        expected = together.sort_values(ARM, kind="stable", ignore_index=True)
        pd.testing.assert_frame_equal(shuffled.reset_index(drop=True), expected)


def test_columns_are_the_ones_promised():
    frame = random_run(2)
    values = ["pooled", "within", "between", "share_within", "pairs", "undefined"]
    assert list(centers.decompose(frame)) == [*ARM, *values]
    assert list(centers.within_by_center(frame)) == [
        *ARM,
        "center",
        "within",
        "pairs",
        "positives",
        "undefined",
    ]


def test_several_epochs_of_a_run_are_refused_by_name():
    frame = random_run(2)
    with pytest.raises(
        ValueError, match=r"binary/t2/fedavg/fold0 has several epochs: apply `metrics.select` first"
    ):
        centers.decompose(pd.concat([frame, frame.assign(epoch=2)]))
