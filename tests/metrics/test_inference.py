from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from frames import global_auc, rows
from scipy.integrate import quad
from scipy.stats import binomtest, ks_2samp, ttest_1samp

from ipmn_core import metrics
from ipmn_core.metrics import inference, scores

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
    task = "binary" if n_classes == 2 else "multiclass"
    names = {"modality": "t1", "task": task, "arm": "centralized"} | names
    fold = i // (n_classes * len(CENTERS)) % folds
    return rows(y, prob, np.array(CENTERS)[center], fold=fold, **names)


@pytest.mark.parametrize("name", ["continuous", "tied", "tiny"])
def test_delong_equals_what_the_r_package_proc_prints(name):
    data = pd.read_csv(PROC / f"{name}.csv")
    printed = pd.read_csv(PROC / "proc.csv").query("set == @name").set_index("name")["value"]
    ours = {}
    for score in ("a", "b"):
        limits = inference.auc_interval(data["y"], data[score])
        ours |= dict(zip((f"auc_{score}", f"low_{score}", f"high_{score}"), limits, strict=True))
        _, error = inference.delong(scores.ordered(data["y"] == 1, data[score]))
        ours[f"var_{score}"] = error**2
    difference, *test = inference.delong_test(data["y"], data["a"], data["b"])
    ours |= dict(zip(("low", "high", "z", "p"), test, strict=True))
    assert difference == pytest.approx(printed["auc_a"] - printed["auc_b"], abs=1e-13)
    assert set(ours) == set(printed.index) - {"cov"}  # z has it
    for key, value in ours.items():
        assert value == pytest.approx(printed[key], rel=1e-12), key  # 15 digits are printed


def test_equal_scores_differ_by_nothing_and_a_difference_without_variance_is_infinite_as_in_proc():
    y, score = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.4, 0.2, 0.3, 0.7, 0.9])
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
    aucs = [0.95, 0.05, 1, 0.7, 0.7, np.nan]
    low, high = inference.hanley_mcneil(aucs, [3, 3, 3, 0, 3, 3], [4, 4, 4, 4, 0, 4])
    np.testing.assert_array_equal(high[[0, 2]], 1)
    assert low[1] == 0 < low[0] < 0.95 and low[2] == 1
    assert np.isnan([low[3:], high[3:]]).all()


def test_corrected_t_gives_scikit_learns_documented_example_and_the_ordinary_t_without_overlap():
    # "Statistical comparison of models using grid search": 100 differences, uncorrected t 2.611
    differences = np.random.default_rng(0).normal(size=100)
    differences += 2.611 * differences.std(ddof=1) / 10 - differences.mean()
    t, p = inference.corrected_t(differences, 1 / 9)
    assert (round(t, 3), round(p / 2, 3)) == (0.750, 0.227)
    ordinary = ttest_1samp(differences, 0)
    assert inference.corrected_t(differences, 0) == pytest.approx((ordinary.statistic, ordinary.pvalue))
    assert inference.corrected_t([0, 0, 0], 0.5) == (0, 1)
    assert inference.corrected_t([-0.1, -0.1, -0.1], 0.5) == (-np.inf, 0)
    assert np.isnan([inference.corrected_t(few, 0.5) for few in ([], [0.1])]).all()


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_weighted_auc_is_that_of_cases_drawn_so_often_and_nan_where_a_class_is_lacking(n_classes):
    y, prob = metrics.y_and_prob(run(n_classes=n_classes))
    weights = np.random.default_rng(0).integers(0, 4, (6, len(y)))
    weights[4, y == 0] = weights[5, y == 1] = 0
    drawn = [np.repeat(np.arange(len(y)), w) for w in weights]
    expected = [metrics.auc(y[i], prob[i]) for i in drawn]
    assert np.isnan(expected).tolist() == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(scores.weighted_auc(y, prob, weights), expected)


def literal_bootstrap(cases, n_resamples):
    """The same bootstrap, drawn case by case."""
    rng, (y, prob) = np.random.default_rng(99), metrics.y_and_prob(cases)
    folds = [
        [cell.to_numpy() for _, cell in of_fold.groupby(["center", "y_true"])["i"]]
        for _, of_fold in cases.assign(i=np.arange(len(cases))).groupby("fold")
    ]
    means = []
    for _ in range(n_resamples):
        drawn = [np.concatenate([rng.choice(cell, len(cell)) for cell in cells]) for cells in folds]
        means.append(np.mean([metrics.auc(y[i], prob[i]) for i in drawn]))
    return np.array(means)


def test_the_bootstrap_agrees_with_drawing_case_by_case():
    cases = run(folds=2, center_effect=0.5)  # so that strata matter
    ours, literal = inference.resampled_auc(cases, 4000), literal_bootstrap(cases, 1000)
    error = np.sqrt(1 / 4000 + 1 / 1000)  # Monte Carlo, in standard deviations of the statistic
    assert ours.mean() == pytest.approx(literal.mean(), abs=4 * error * literal.std())
    assert ours.std() == pytest.approx(literal.std(), rel=4 * error / np.sqrt(2))
    assert ks_2samp(ours, literal).pvalue > 0.01
    np.testing.assert_array_equal(inference.bootstrap_auc(cases, 4000), np.quantile(ours, [0.025, 0.975]))


def test_lone_cases_do_not_vary_and_give_no_interval():
    alone = run(n=6, folds=1)  # one case per center and label
    auc = global_auc(alone)
    assert 0 < auc < 1
    np.testing.assert_allclose(inference.resampled_auc(alone), auc)
    row = inference.intervals(alone).iloc[-1]
    assert row["auc"] == auc and row[["auc_low", "auc_high"]].isna().all()
    assert row["undefined"] == "one case per center and label: nothing for the bootstrap to draw"


def test_a_fold_without_a_class_is_left_out_of_the_bootstrap():
    cases = run()
    low, high = inference.bootstrap_auc(cases[(cases["fold"] != 1) | (cases["y_true"] == 0)])
    auc = np.mean([global_auc(cases[cases["fold"] == fold]) for fold in (0, 2)])
    assert low < auc < high
    assert np.isnan(inference.bootstrap_auc(cases[cases["y_true"] == 0])).all()


def test_intervals_are_those_of_the_numbers_in_the_tables(binary_predictions):
    both = pd.concat([binary_predictions, run(n_classes=3, arm="resnet34")], ignore_index=True)
    table = inference.intervals(both, n_resamples=200)
    summary, keys = metrics.over_folds(metrics.by_fold(both)), [*metrics.ARM, "center"]
    expected = summary[[*keys, "auc_mean"]].rename(columns={"auc_mean": "auc"})
    pd.testing.assert_frame_equal(table[[*keys, "auc"]], expected)
    for row in table.itertuples():
        mine = (both[metrics.ARM] == [row.task, row.modality, row.arm]).all(axis=1)
        part = both[mine & ((both["center"] == row.center) | (row.center == "global"))]
        y, prob = metrics.y_and_prob(part)
        high = prob.shape[1] - 1
        assert (row.n, row.positives) == (len(y), (y == high).sum())
        np.testing.assert_equal((row.auc_low, row.auc_high), inference.bootstrap_auc(part, 200))
        pooled = inference.auc_interval(y, prob[:, 1]) if high == 1 else (np.nan,) * 3
        np.testing.assert_equal((row.pooled_auc, row.pooled_low, row.pooled_high), pooled)
        assert row.acc == metrics.accuracy(y, prob)
        wilson = binomtest(round(row.acc * row.n), row.n).proportion_ci(method="wilson")
        assert (row.acc_low, row.acc_high) == pytest.approx(wilson)


def test_intervals_say_why_a_number_is_undefined():
    cases = run()
    at, positive = cases["center"], cases["y_true"] == 1
    dropped = positive & ((at == "NYU") | ((at == "MCF") & (cases["fold"] > 0)))
    table = inference.intervals(cases[~dropped], n_resamples=10).set_index("center")
    nyu, mcf, ahn = (table.loc[center] for center in CENTERS)
    assert nyu["undefined"] == "no positive case in fold 0, 1, 2"
    assert nyu[["auc", "auc_low", "auc_high", "pooled_auc", "pooled_low", "pooled_high"]].isna().all()
    assert mcf["undefined"] == "no positive case in fold 1, 2"
    assert mcf["auc"] == global_auc(cases[(at == "MCF") & (cases["fold"] == 0)])
    assert ahn["undefined"] == table.loc["global", "undefined"] == ""
    row = inference.intervals(cases[~positive | (cases.index == 1)], 10).iloc[-1]
    assert row["undefined"].endswith("DeLong needs two cases of each class")
    assert not np.isnan(row["pooled_auc"]) and np.isnan(row["pooled_low"])
    three = inference.intervals(run(n_classes=3), n_resamples=10)
    assert set(three["undefined"]) == {"DeLong is for two classes"}


def test_every_arm_is_compared_with_the_reference_case_by_case():
    reference, fedavg, local = run(), run(seed=1, arm="fedavg"), run(seed=2, signal=0.1, arm="local_only")
    other_order = fedavg.sample(frac=1, random_state=0)
    table = inference.compare_arms(pd.concat([other_order, reference, local], ignore_index=True))
    assert table["arm"].tolist() == ["fedavg", "local_only"]
    assert set(table["reference"]) == {"centralized"}
    for arm, (_, row) in zip((fedavg, local), table.iterrows(), strict=True):
        expected = inference.delong_test(arm["y_true"], arm["prob_1"], reference["prob_1"])
        assert row[["difference", "low", "high", "z", "p_delong"]].tolist() == pytest.approx(expected)
        ours, theirs = ([global_auc(a[a["fold"] == k]) for k in range(3)] for a in (arm, reference))
        difference = np.subtract(ours, theirs)
        assert row["fold_difference"] == pytest.approx(difference.mean())
        # trained on two of three folds, tested on one
        assert (row["t"], row["p_corrected"]) == pytest.approx(inference.corrected_t(difference, 1 / 2))
        assert row["undefined"] == ""
    for name in ("p_delong", "p_corrected"):
        low, high = sorted(table[name])
        assert sorted(table[f"{name}_holm"]) == pytest.approx([2 * low, max(2 * low, high)])


def test_multiclasses_have_the_corrected_t_alone_and_holm_is_over_all_tasks():
    three = [run(n_classes=3, seed=seed, arm=arm) for seed, arm in enumerate(("centralized", "resnet34"))]
    two = [run(seed=seed, arm=arm, signal=0.1 + seed) for seed, arm in enumerate(("centralized", "fedavg"))]
    table = inference.compare_arms(pd.concat([*three, *two], ignore_index=True))
    assert table["task"].tolist() == ["multiclass", "binary"]
    row = table.iloc[0]
    assert row["undefined"] == "DeLong is for two classes"
    assert row[["difference", "low", "high", "z", "p_delong", "p_delong_holm"]].isna().all()
    assert table["p_corrected_holm"].min() == pytest.approx(2 * table["p_corrected"].min())
    assert table.loc[1, "p_delong_holm"] == table.loc[1, "p_delong"]  # a family of one


def test_a_task_without_the_reference_is_left_out():
    arms = pd.concat([run(arm="fedavg"), run(arm="local_only", seed=1), run(n_classes=3, arm="resnet34")])
    table = inference.compare_arms(arms, "fedavg")
    assert table[["task", "arm"]].to_numpy().tolist() == [["binary", "local_only"]]
    assert list(inference.compare_arms(arms).columns) == list(table.columns)


def test_folds_without_a_class_are_left_out_of_the_comparison_and_named():
    cases = pd.concat([run(), run(seed=1, arm="fedavg")], ignore_index=True)
    cases = cases[(cases["fold"] != 1) | (cases["y_true"] == 0)]
    row = inference.compare_arms(cases).iloc[0]
    assert row["undefined"] == "no positive case in fold 1" and not np.isnan(row["p_corrected"])
    row = inference.compare_arms(cases[cases["fold"] < 2]).iloc[0]
    assert row["undefined"] == "no positive case in fold 1; corrected t needs two folds"
    assert np.isnan([row["t"], row["p_corrected"], row["p_corrected_holm"]]).all()
    assert not np.isnan([row["p_delong"], row["fold_difference"]]).any()


def test_arms_tested_on_other_cases_folds_or_labels_are_refused_by_the_first_case():
    reference, arm = run(), run(seed=1, arm="fedavg")
    for parts, message in [
        ((reference, arm.drop(index=[7, 9])), r"case_7 of .* \(fold 1, label 1\).*only by centralized"),
        ((reference.drop(index=7), arm), r"case_7 .*only by fedavg"),
        ((reference, arm.assign(fold=arm["fold"].where(arm.index != 0, 2))), "case_0 "),
        ((reference, arm.assign(y_true=arm["y_true"].where(arm.index != 4, 1))), "case_4 "),
    ]:
        with pytest.raises(ValueError, match=message):
            inference.compare_arms(pd.concat(parts))
