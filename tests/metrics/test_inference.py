from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import ks_2samp, norm, ttest_1samp
from sklearn.metrics import roc_auc_score
from test_metrics import global_auc

from ipmn_core import metrics
from ipmn_core.metrics import inference

pytestmark = pytest.mark.filterwarnings("error")  # an undefined value is NaN, never a warning

PROC = Path(__file__).parent / "proc"
CENTERS = ("NYU", "MCF", "AHN")


def run(n=90, n_classes=2, folds=3, seed=0, signal=0.5, center_effect=0.0, **names):
    """Rows of one arm: the same cases for every seed, scores with ties, better than chance by `signal`."""
    i, rng = np.arange(n), np.random.default_rng(seed)
    y, center = i % n_classes, i // n_classes % len(CENTERS)
    prob = rng.dirichlet(np.ones(n_classes), n)
    prob[i, y] += signal
    prob[:, -1] += center_effect * center
    prob = (prob / prob.sum(axis=1, keepdims=True)).round(2)
    frame = pd.DataFrame({"case_id": [f"case_{k:03d}" for k in i], "center": np.array(CENTERS)[center]})
    task = "binary" if n_classes == 2 else "three_class"
    names = {"modality": "t1", "task": task, "arm": "centralized"} | names
    fold = i // (n_classes * len(CENTERS)) % folds
    frame = frame.assign(**names, fold=fold, seed=0, epoch=1, y_true=y)
    return frame.assign(**{f"prob_{k}": prob[:, k] for k in range(n_classes)})


def place(table, **where):
    """The one row of a table with these values."""
    rows = table[np.logical_and.reduce([table[key] == value for key, value in where.items()])]
    assert len(rows) == 1
    return rows.iloc[0]


# DeLong


@pytest.mark.parametrize("name", ["continuous", "tied", "tiny"])
def test_delong_equals_what_the_r_package_proc_prints(name):
    data = pd.read_csv(PROC / f"{name}.csv")
    printed = pd.read_csv(PROC / "proc.csv").query("set == @name").set_index("name")["value"]
    _, covariance = inference.delong(data["y"], data[["a", "b"]])
    ours = {"var_a": covariance[0, 0], "var_b": covariance[1, 1], "cov": covariance[0, 1]}
    for score in ("a", "b"):
        limits = inference.auc_interval(data["y"], data[score])
        ours |= dict(zip((f"auc_{score}", f"low_{score}", f"high_{score}"), limits, strict=True))
    difference, *test = inference.delong_test(data["y"], data["a"], data["b"])
    ours |= dict(zip(("low", "high", "z", "p"), test, strict=True))
    assert difference == pytest.approx(printed["auc_a"] - printed["auc_b"], abs=1e-13)
    assert set(ours) == set(printed.index)
    for key, value in ours.items():
        assert value == pytest.approx(printed[key], rel=1e-12), key  # 15 digits are printed


def test_delong_equals_the_definition_by_pairs():
    data = pd.read_csv(PROC / "tied.csv")
    y, scores = data["y"].to_numpy(), data[["a", "b"]].to_numpy()
    wins = (np.sign(scores[y == 1][:, None] - scores[y == 0][None]) + 1) / 2  # (n_pos, n_neg, 2)
    s_pos, s_neg = np.cov(wins.mean(axis=1).T), np.cov(wins.mean(axis=0).T)
    auc, covariance = inference.delong(y, scores)
    np.testing.assert_allclose(auc, wins.mean(axis=(0, 1)), rtol=1e-12)  # float64 sums
    np.testing.assert_allclose(covariance, s_pos / 60 + s_neg / 90, rtol=1e-12)


def test_delongs_auc_is_the_one_of_the_tables():
    y, prob = metrics.y_and_prob(run())
    assert inference.auc_interval(y, prob[:, 1])[0] == pytest.approx(metrics.auc(y, prob), abs=1e-14)


def test_equal_scores_differ_by_nothing_and_a_difference_without_variance_is_infinite_as_in_proc():
    y, score = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.4, 0.2, 0.3, 0.7, 0.9])
    assert inference.delong_test(y, score, score) == (0, 0, 0, 0, 1)
    assert inference.delong_test(y, score, score**3) == (0, 0, 0, 0, 1)  # the ranks are the same
    perfect = np.array([1, 2, 3, 4, 5, 6])
    assert inference.delong_test(y, perfect, -perfect) == (1, 1, 1, np.inf, 0)
    assert inference.delong_test(y, -perfect, perfect) == (-1, -1, -1, -np.inf, 0)
    assert inference.auc_interval(y, perfect) == (1, 1, 1)


@pytest.mark.parametrize(("y", "auc"), [([0, 0, 1], 1), ([1, 1, 0], 0), ([0, 0, 0], np.nan)])
def test_delong_without_two_cases_of_each_class_is_nan(y, auc):
    np.testing.assert_equal(inference.auc_interval(y, [1, 2, 3]), (auc, np.nan, np.nan))
    difference, *others = inference.delong_test(y, [1, 2, 3], [1, 2, 3])
    np.testing.assert_equal(difference, auc * 0)
    assert np.isnan(others).all()


def test_a_wider_level_gives_a_wider_interval():
    y, prob = metrics.y_and_prob(run())
    auc, low, high = inference.auc_interval(y, prob[:, 1], level=0.5)
    half = norm.ppf(0.75) * np.sqrt(inference.delong(y, prob[:, [1]])[1][0, 0])
    assert (low, high) == (pytest.approx(auc - half), pytest.approx(auc + half))


# Intervals from counts


@pytest.mark.parametrize(("auc", "n_pos", "n_neg"), [(0.75, 20, 50), (0.9, 51, 58), (0.5, 4, 12)])
def test_hanley_mcneil_variance_is_that_of_exponential_scores(auc, n_pos, n_neg):
    # positives and negatives exponential with rates r and 1: P(positive > negative) = 1 / (1 + r) = auc
    r = 1 / auc - 1
    two_positives_above = quad(lambda x: np.exp(-x) * np.exp(-r * x) ** 2, 0, np.inf)[0]
    two_negatives_below = quad(lambda x: r * np.exp(-r * x) * (1 - np.exp(-x)) ** 2, 0, np.inf)[0]
    variance = auc * (1 - auc) + (n_pos - 1) * (two_positives_above - auc**2)
    variance += (n_neg - 1) * (two_negatives_below - auc**2)
    half = 1.959963984540054 * np.sqrt(variance / (n_pos * n_neg))
    low, high = inference.hanley_mcneil(auc, n_pos, n_neg)
    assert (low, high) == (pytest.approx(auc - half, abs=1e-7), pytest.approx(auc + half, abs=1e-7))  # quad


def test_hanley_mcneil_broadcasts_is_cut_to_the_unit_interval_and_nan_without_a_class():
    low, high = inference.hanley_mcneil(
        [0.95, 0.05, 1, 0.7, 0.7, np.nan], [3, 3, 3, 0, 3, 3], [4, 4, 4, 4, 0, 4]
    )
    np.testing.assert_array_equal(high[[0, 2]], 1)
    assert low[1] == 0 < low[0] < 0.95
    assert low[2] == 1
    assert np.isnan([low[3:], high[3:]]).all()


def test_wilson_gives_newcombes_published_example_and_solves_the_score_equation():
    # Newcombe 1998, Stat. Med. 17:857-872, table I: 81 of 263
    assert np.round(inference.wilson(81, 263), 4).tolist() == [0.2553, 0.3662]
    correct, n = np.array([0, 7, 20]), np.array([10, 16, 20])
    for limit in inference.wilson(correct, n):
        inside = (limit > 1e-12) & (limit < 1 - 1e-12)
        z = (correct / n - limit)[inside] / np.sqrt(limit * (1 - limit) / n)[inside]
        np.testing.assert_allclose(np.abs(z), norm.ppf(0.975), rtol=1e-9)  # float64 roots
    assert np.isnan(inference.wilson(0, 0)).all()


# Tests over folds, families of tests


def test_corrected_t_gives_scikit_learns_documented_example():
    # "Statistical comparison of models using grid search": 100 differences, uncorrected t 2.611
    differences = np.random.default_rng(0).normal(size=100)
    differences += 2.611 * differences.std(ddof=1) / 10 - differences.mean()
    t, p = inference.corrected_t(differences, 1 / 9)
    assert (round(t, 3), round(p / 2, 3)) == (0.750, 0.227)


def test_corrected_t_without_overlap_is_the_ordinary_t():
    differences = np.array([0.02, -0.01, 0.05, 0.03])
    ordinary = ttest_1samp(differences, 0)
    assert inference.corrected_t(differences, 0) == pytest.approx((ordinary.statistic, ordinary.pvalue))


def test_corrected_t_of_equal_differences_and_of_too_few_folds():
    assert inference.corrected_t([0, 0, 0], 0.5) == (0, 1)
    assert inference.corrected_t([0.1, 0.1, 0.1], 0.5) == (np.inf, 0)
    assert inference.corrected_t([-0.1, -0.1, -0.1], 0.5) == (-np.inf, 0)
    assert np.isnan([inference.corrected_t(few, 0.5) for few in ([], [0.1])]).all()


def test_holm_gives_the_values_worked_by_hand_and_leaves_nan_out_of_the_family():
    # sorted 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to the 0.06 before it
    adjusted = inference.holm([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, np.nan, 0.06, 0.02], rtol=1e-12)
    np.testing.assert_array_equal(inference.holm([0.9, 0.8]), [1, 1])
    assert np.isnan(inference.holm([np.nan])).all()
    assert len(inference.holm([])) == 0


# Bootstrap


@pytest.mark.parametrize("n_classes", [2, 3])
def test_weights_give_the_auc_of_the_resample_that_they_count(n_classes):
    y, prob = metrics.y_and_prob(run(n_classes=n_classes))
    prob /= prob.sum(axis=1, keepdims=True)  # scikit-learn insists on rows that sum to one
    rng, weights = np.random.default_rng(0), np.zeros((5, len(y)))
    for k in range(n_classes):
        weights[:, y == k] = rng.multinomial((y == k).sum(), np.full((y == k).sum(), 1 / (y == k).sum()), 5)
    for w, auc in zip(weights, inference.weighted_auc(y, prob, weights), strict=True):
        drawn = np.repeat(np.arange(len(y)), w.astype(int))
        score = prob[drawn, 1] if n_classes == 2 else prob[drawn]
        assert auc == pytest.approx(roc_auc_score(y[drawn], score, multi_class="ovr"), abs=1e-12)  # sums


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_weighted_auc_is_its_definition_by_pairs_and_nan_where_a_resample_lacks_a_class(n_classes):
    y, prob = metrics.y_and_prob(run(n_classes=n_classes))
    prob = prob.round(1)  # more ties, within classes and across
    weights = np.random.default_rng(0).integers(0, 4, (6, len(y))).astype(float)
    weights[4:, y == 1] = 0
    aucs = []
    for k in range(1, 2) if n_classes == 2 else range(3):
        wins = (np.sign(np.subtract.outer(prob[:, k], prob[:, k])) + 1) / 2 * np.outer(y == k, y != k)
        pairs = weights @ np.outer(y == k, y != k) * weights
        aucs.append([w @ wins @ w / n if n else np.nan for w, n in zip(weights, pairs.sum(1), strict=True)])
    expected = np.mean(aucs, axis=0)
    assert np.isnan(expected).tolist() == [False] * 4 + [True] * 2
    np.testing.assert_allclose(inference.weighted_auc(y, prob, weights), expected, rtol=1e-12)  # sums


def literal_bootstrap(rows, n_resamples):
    """The same bootstrap, drawn case by case."""
    rng, (y, prob) = np.random.default_rng(99), metrics.y_and_prob(rows)
    folds = [
        [cell.to_numpy() for _, cell in of_fold.groupby(["center", "y_true"])["i"]]
        for _, of_fold in rows.assign(i=np.arange(len(rows))).groupby("fold")
    ]
    means = []
    for _ in range(n_resamples):
        drawn = [np.concatenate([rng.choice(cell, len(cell)) for cell in cells]) for cells in folds]
        means.append(np.mean([metrics.auc(y[i], prob[i]) for i in drawn]))
    return np.array(means)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_bootstrap_agrees_with_drawing_case_by_case(n_classes):
    rows = run(n_classes=n_classes, folds=2, center_effect=0.5)  # so that strata matter
    ours, literal = inference.resampled_auc(rows, 4000), literal_bootstrap(rows, 1000)
    error = np.sqrt(1 / 4000 + 1 / 1000)  # Monte Carlo, in standard deviations of the statistic
    assert ours.mean() == pytest.approx(literal.mean(), abs=4 * error * literal.std())
    assert ours.std() == pytest.approx(literal.std(), rel=4 * error / np.sqrt(2))
    assert ks_2samp(ours, literal).pvalue > 0.01
    low, high = inference.bootstrap_auc(rows, 4000)
    # a normal's 2.5 % quantile has 2.67 times the error of its mean
    expected = np.quantile(literal, [0.025, 0.975])
    np.testing.assert_allclose([low, high], expected, atol=4 * 2.67 * error * literal.std())


def test_bootstrap_variance_is_near_delongs_on_a_big_sample():
    rows = run(n=600, folds=1, signal=0.2).assign(center="NYU")
    y, prob = metrics.y_and_prob(rows)
    variance = inference.delong(y, prob[:, [1]])[1][0, 0]
    # 2,000 resamples know a variance to 3 %; (n - 1)/n and ties add less than 1 %
    assert inference.resampled_auc(rows).var() == pytest.approx(variance, rel=0.12)


def test_perfect_separation_stays_perfect():
    rows = run()
    perfect = rows.assign(prob_1=rows["y_true"], prob_0=1 - rows["y_true"])
    assert inference.bootstrap_auc(perfect) == (1, 1)


def test_lone_cases_do_not_vary_and_give_no_interval():
    alone = run(n=6, folds=1)  # one case per center and label
    auc = global_auc(alone)
    assert 0 < auc < 1
    np.testing.assert_allclose(inference.resampled_auc(alone), auc)
    row = inference.intervals(alone).iloc[-1]
    assert row["auc"] == auc
    assert row[["auc_low", "auc_high"]].isna().all()
    assert row["undefined"] == "one case per center and label: nothing for the bootstrap to draw"


def test_the_bootstrap_depends_on_the_seed_and_not_on_the_order_of_rows():
    rows = run()
    again = inference.resampled_auc(rows.sample(frac=1, random_state=1), 200)
    np.testing.assert_allclose(inference.resampled_auc(rows, 200), again, rtol=1e-12)  # order of summation
    assert (inference.resampled_auc(rows, 200, seed=1) != again).any()


def test_a_fold_without_a_class_is_left_out_of_the_bootstrap():
    rows = run()
    lacking = rows[(rows["fold"] != 1) | (rows["y_true"] == 0)]
    low, high = inference.bootstrap_auc(lacking)
    auc = np.mean([global_auc(rows[rows["fold"] == fold]) for fold in (0, 2)])
    assert low < auc < high
    assert np.isnan(inference.bootstrap_auc(rows[rows["y_true"] == 0])).all()


# Table of intervals


def test_intervals_are_those_of_the_numbers_in_the_tables(binary_predictions):
    both = pd.concat([binary_predictions, run(n_classes=3, arm="resnet34")], ignore_index=True)
    table = inference.intervals(both, n_resamples=200)
    summary = metrics.over_folds(metrics.by_fold(both)).set_index([*inference.ARM, "center"])["auc_mean"]
    for row in table.itertuples():
        mine = np.logical_and.reduce([both[key] == getattr(row, key) for key in inference.ARM])
        part = both[mine & ((both["center"] == row.center) | (row.center == "global"))]
        y, prob = metrics.y_and_prob(part)
        high = prob.shape[1] - 1
        assert (row.n, row.positives) == (len(y), (y == high).sum())
        limits = (row.auc_low, row.auc_high)
        np.testing.assert_equal(limits, inference.bootstrap_auc(part, n_resamples=200))
        np.testing.assert_equal(row.auc, summary[row.task, row.modality, row.arm, row.center])
        assert np.isnan(row.auc) or row.auc_low <= row.auc <= row.auc_high
        pooled = inference.auc_interval(y, prob[:, 1]) if high == 1 else (np.nan,) * 3
        np.testing.assert_equal((row.pooled_auc, row.pooled_low, row.pooled_high), pooled)
        assert row.acc == pytest.approx(metrics.accuracy(y, prob), abs=1e-15)
        assert (row.acc_low, row.acc_high) == inference.wilson(round(row.acc * row.n), row.n)


def test_intervals_follow_the_order_of_arms_and_of_the_papers_centers():
    shuffled = [run(arm=arm, modality=m) for arm in ("fedavg", "centralized") for m in ("t2", "t1")]
    table = inference.intervals(pd.concat(shuffled).sort_values("center", kind="stable"), n_resamples=10)
    assert table["center"].tolist() == ["NYU", "MCF", "AHN", "global"] * 4
    assert table["modality"].tolist() == ["t2"] * 8 + ["t1"] * 8
    assert table["arm"].tolist() == (["fedavg"] * 4 + ["centralized"] * 4) * 2


def test_the_level_reaches_every_interval():
    wide = inference.intervals(run(), n_resamples=200).iloc[-1]
    narrow = inference.intervals(run(), n_resamples=200, level=0.5).iloc[-1]
    for name in ("auc", "pooled", "acc"):
        assert narrow[f"{name}_high"] < wide[f"{name}_high"]
        assert narrow[f"{name}_low"] > wide[f"{name}_low"]


def test_intervals_say_why_a_number_is_undefined():
    rows = run()
    at = rows["center"]
    none_at_nyu = (at == "NYU") & (rows["y_true"] == 1)
    missing_folds_at_mcf = (at == "MCF") & (rows["y_true"] == 1) & (rows["fold"] > 0)
    table = inference.intervals(rows[~none_at_nyu & ~missing_folds_at_mcf], n_resamples=10)
    nyu, mcf, ahn = (place(table, center=center) for center in CENTERS)
    assert nyu["undefined"] == "no high-risk case in fold 0, 1, 2"
    assert nyu[["auc", "auc_low", "auc_high", "pooled_auc", "pooled_low", "pooled_high"]].isna().all()
    assert nyu["acc_low"] <= nyu["acc"] <= nyu["acc_high"]
    assert mcf["undefined"] == "no high-risk case in fold 1, 2"
    assert mcf["auc"] == global_auc(rows[(at == "MCF") & (rows["fold"] == 0)])
    assert ahn["undefined"] == place(table, center="global")["undefined"] == ""
    one = inference.intervals(rows[(rows["y_true"] == 0) | (rows.index == 1)], n_resamples=10)
    row = place(one, center="global")
    assert row["undefined"].endswith("one high-risk case: too few for a DeLong interval")
    assert not np.isnan(row["pooled_auc"])
    assert np.isnan(row["pooled_low"])
    three = inference.intervals(run(n_classes=3), n_resamples=10)
    assert set(three["undefined"]) == {"macro AUC has no DeLong interval"}
    assert not three[["auc", "auc_low", "auc_high"]].isna().any(axis=None)


def test_several_epochs_are_refused():
    epochs = pd.concat([run(), run().assign(epoch=2)])
    for function in (inference.intervals, inference.compare_arms):
        with pytest.raises(ValueError, match="several epochs"):
            function(epochs)


# Comparison of arms


def test_every_arm_is_compared_with_the_reference_case_by_case():
    reference, fedavg, local = run(), run(seed=1, arm="fedavg"), run(seed=2, signal=0.1, arm="local_only")
    other_order = fedavg.sample(frac=1, random_state=0)
    table = inference.compare_arms(pd.concat([other_order, reference, local], ignore_index=True))
    assert table["arm"].tolist() == ["fedavg", "local_only"]
    assert set(table["reference"]) == {"centralized"}
    for arm in (fedavg, local):
        row = place(table, arm=arm["arm"].iloc[0])
        expected = inference.delong_test(arm["y_true"], arm["prob_1"], reference["prob_1"])
        assert row[["difference", "low", "high", "z", "p_delong"]].tolist() == pytest.approx(expected)
        aucs = [[global_auc(a[a["fold"] == k]) for k in range(3)] for a in (arm, reference)]
        difference = np.subtract(*aucs)
        assert row["fold_difference"] == pytest.approx(difference.mean())
        # trained on two of three folds, tested on one
        assert (row["t"], row["p_corrected"]) == pytest.approx(inference.corrected_t(difference, 1 / 2))
        assert row["undefined"] == ""
    for name in ("p_delong", "p_corrected"):
        np.testing.assert_array_equal(table[f"{name}_holm"], inference.holm(table[name]))
        assert (table[f"{name}_holm"] > table[name]).any()


def test_three_classes_have_the_corrected_t_alone_and_holm_is_over_all_tasks():
    three = [run(n_classes=3, seed=seed, arm=arm) for seed, arm in enumerate(("centralized", "resnet34"))]
    two = [run(seed=seed, arm=arm, signal=0.1 + seed) for seed, arm in enumerate(("centralized", "fedavg"))]
    table = inference.compare_arms(pd.concat([*three, *two], ignore_index=True))
    assert table["task"].tolist() == ["three_class", "binary"]
    row = table.iloc[0]
    assert row["undefined"] == "macro AUC has no DeLong test"
    assert row[["difference", "low", "high", "z", "p_delong", "p_delong_holm"]].isna().all()
    assert 0 < row["p_corrected"] <= 1
    assert table["p_corrected_holm"].min() == pytest.approx(2 * table["p_corrected"].min())
    assert table.loc[1, "p_delong_holm"] == table.loc[1, "p_delong"]  # a family of one


def test_a_task_without_the_reference_is_left_out():
    arms = pd.concat([run(arm="fedavg"), run(arm="local_only", seed=1)])
    empty = inference.compare_arms(arms)
    full = inference.compare_arms(arms, reference="fedavg")
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert full["arm"].tolist() == ["local_only"]
    three = pd.concat([run(n_classes=3, arm="resnet34"), arms], ignore_index=True)
    assert inference.compare_arms(three, reference="fedavg")["task"].tolist() == ["binary"]


def test_folds_without_a_class_are_left_out_of_the_comparison_and_named():
    rows = pd.concat([run(), run(seed=1, arm="fedavg")], ignore_index=True)
    rows = rows[(rows["fold"] != 1) | (rows["y_true"] == 0)]
    row = inference.compare_arms(rows).iloc[0]
    assert row["undefined"] == "no high-risk case in fold 1"
    assert not np.isnan(row["p_corrected"])
    row = inference.compare_arms(rows[rows["fold"] < 2]).iloc[0]
    assert row["undefined"] == "no high-risk case in fold 1; corrected t needs two folds"
    assert np.isnan([row["t"], row["p_corrected"], row["p_corrected_holm"]]).all()
    assert not np.isnan([row["p_delong"], row["fold_difference"]]).any()
    row = inference.compare_arms(rows[rows["fold"] == 0]).iloc[0]
    assert row["undefined"] == "corrected t needs two folds"


def test_arms_tested_on_other_cases_folds_or_labels_are_refused_by_the_first_case():
    reference, arm = run(), run(seed=1, arm="fedavg")
    with pytest.raises(
        ValueError, match=r"case_007 of binary/t1 \(fold 1, label 1\).*centralized, not by fedavg"
    ):
        inference.compare_arms(pd.concat([reference, arm.drop(index=[7, 9])]))
    with pytest.raises(ValueError, match=r"case_007 .*by fedavg, not by centralized"):
        inference.compare_arms(pd.concat([reference.drop(index=7), arm]))
    other_fold = arm.assign(fold=arm["fold"].where(arm.index != 0, 2))
    with pytest.raises(ValueError, match="case_000"):
        inference.compare_arms(pd.concat([reference, other_fold]))
    other_label = arm.assign(y_true=arm["y_true"].where(arm.index != 4, 1))
    with pytest.raises(ValueError, match="case_004"):
        inference.compare_arms(pd.concat([reference, other_label]))
