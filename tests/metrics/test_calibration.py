import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve

from ipmn_core import metrics
from ipmn_core.metrics import calibration

pytestmark = pytest.mark.filterwarnings("error")


def rows(y, prob, center="NYU", task="binary", modality="t2", arm="fedavg", fold=0):
    """Predictions of one run and epoch; prob (N,) of high risk, the rest going to the lower classes."""
    y, prob = np.asarray(y), np.asarray(prob, dtype=float)
    lower = {"binary": [1 - prob], "three_class": [(1 - prob) / 2, (1 - prob) / 2]}[task]
    columns = {f"prob_{k}": p for k, p in enumerate([*lower, prob])}
    run = {"center": center, "modality": modality, "task": task, "arm": arm, "fold": fold, "seed": 0}
    cases = [f"{fold}_{i:03d}" for i in range(len(y))]
    return pd.DataFrame({"case_id": cases, **run, "epoch": 1, "y_true": y, **columns})


@pytest.fixture(scope="module")
def selected():
    """Both tasks, modalities and several arms and folds, scores of two decimals: plenty of ties."""
    rng, frames = np.random.default_rng(0), []
    for task, arms in (("three_class", ("resnet34", "densenet121")), ("binary", ("fedavg", "centralized"))):
        for modality in ("t2", "t1"):
            for fold in range(3):
                y = rng.integers(0, 3 if task == "three_class" else 2, 50)
                center = rng.choice(["EMC", "NYU", "AHN"], 50)
                for arm in arms:
                    prob = np.clip(rng.normal(0.3 + 0.1 * y, 0.25), 0, 1).round(2)
                    frames.append(rows(y, prob, center, task, modality, arm, fold))
    return pd.concat(frames, ignore_index=True)


def arms_of(selected):
    return selected.groupby(["task", "modality", "arm"])


def loop_bins(y, prob, bins):
    """Members of every bin, found case by case: bin k holds (k-1)/bins < p <= k/bins, the first 0 too."""
    edges = np.linspace(0, 1, bins + 1)
    members = {k: [] for k in range(1, bins + 1)}
    for case, p in enumerate(prob):
        members[next(k for k in members if p <= edges[k] or k == bins)].append(case)
    return {k: found for k, found in members.items() if found}


def test_high_risk_is_the_highest_class_of_either_task():
    both = pd.concat([rows([0, 1], [0.2, 0.7]), rows([0, 1, 2], [0.1, 0.3, 0.6], task="three_class")])
    y, prob = calibration.high_risk(both[both["task"] == "binary"])  # prob_2 is NaN here
    assert y.tolist() == [False, True] and prob.tolist() == [0.2, 0.7]
    y, prob = calibration.high_risk(both[both["task"] == "three_class"])
    assert y.tolist() == [False, False, True] and prob.tolist() == [0.1, 0.3, 0.6]
    with pytest.raises(ValueError, match="several tasks"):
        calibration.high_risk(both)


def test_a_reliability_curve_equals_scikit_learns_and_one_counted_case_by_case(selected):
    curve = calibration.reliability(selected, bins=7)
    assert list(curve) == [*calibration.ARM, "bin", "n", "predicted", "observed", "low", "high"]
    for arm, frame in arms_of(selected):
        y, prob = calibration.high_risk(frame)
        ours = arms_of(curve).get_group(arm)
        observed, predicted = calibration_curve(y, prob, n_bins=7)
        np.testing.assert_allclose(ours["observed"], observed, atol=1e-12)  # sums in another order
        np.testing.assert_allclose(ours["predicted"], predicted, atol=1e-12)
        members = loop_bins(y, prob, 7)
        assert ours["bin"].tolist() == list(members)
        assert ours["n"].tolist() == [len(found) for found in members.values()]


def test_bins_are_closed_on_the_right_and_empty_ones_are_left_out():
    curve = calibration.reliability(rows([0, 1, 0, 1, 1], [0, 0.1, 0.11, 0.3, 1]))
    assert curve["bin"].tolist() == [1, 2, 3, 10] and curve["n"].tolist() == [2, 1, 1, 1]
    assert curve["observed"].tolist() == [0.5, 0, 1, 1] and curve["predicted"].tolist() == [
        0.05,
        0.11,
        0.3,
        1,
    ]


@pytest.mark.parametrize(
    ("positives", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_newcombe_1998(positives, n, low, high):
    """Newcombe, Stat Med 1998;17:857, table I, score method without continuity correction."""
    curve = calibration.reliability(rows(np.arange(n) < positives, np.full(n, 0.25)))
    # the table prints four decimals
    assert curve[["low", "high"]].to_numpy() == pytest.approx(np.array([[low, high]]), abs=5e-5)


def test_rows_come_by_task_and_modality_with_arms_and_centers_in_their_order(selected):
    named = {"binary": ("fedavg", "centralized"), "three_class": ("resnet34", "densenet121")}
    arms = [(t, m, a) for t, names in named.items() for m in ("t1", "t2") for a in names]
    assert list(calibration.reliability(selected).groupby(calibration.ARM, sort=False).groups) == arms
    table = calibration.table(selected)
    assert list(table.groupby(calibration.ARM, sort=False).groups) == arms
    assert (table.groupby(calibration.ARM)["center"].agg(list) == [["NYU", "AHN", "EMC", "global"]] * 8).all()
    curve = calibration.decision_curve(selected)
    order = curve.groupby(["task", "modality"])["arm"].unique()
    assert order["binary", "t1"].tolist() == ["fedavg", "centralized", "treat all", "treat none"]
    assert order["three_class", "t2"].tolist() == ["resnet34", "densenet121", "treat all", "treat none"]


def test_a_perfectly_calibrated_set_has_no_calibration_error():
    prob = np.repeat([0.125, 0.5, 0.875], 8)
    y = np.concatenate([np.arange(8) < k for k in (1, 4, 7)])
    assert calibration.expected_calibration_error(y, prob) == 0


def test_the_calibration_error_equals_the_value_counted_by_hand():
    # bin 2: 3 cases at 0.2, none positive, gap 0.2; bin 10: 1 case at 1, negative, gap 1
    error = calibration.expected_calibration_error([0, 0, 0, 0], [0.2, 0.2, 0.2, 1])
    assert error == pytest.approx((3 * 0.2 + 1) / 4, abs=1e-15)  # rounding of the mean


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
def test_the_calibration_error_agrees_with_loops_over_bins_and_cases(selected, bins):
    for _, frame in arms_of(selected):
        y, prob = calibration.high_risk(frame)
        gaps = [
            len(found) * abs(sum(prob[i] for i in found) / len(found) - sum(y[i] for i in found) / len(found))
            for found in loop_bins(y, prob, bins).values()
        ]
        error = calibration.expected_calibration_error(y, prob, bins)
        assert error == pytest.approx(sum(gaps) / len(y), abs=1e-12)  # sums in another order


def test_the_brier_score_splits_into_reliability_resolution_and_that_of_the_prevalence():
    """Murphy, J Appl Meteorol 1973;12:595: exact where the forecasts of a bin are equal."""
    rng = np.random.default_rng(1)
    prob = rng.choice([0.05, 0.25, 0.45, 0.75, 0.95], 200)
    frame = rows((rng.random(200) < prob**2).astype(int), prob)
    curve, row = calibration.reliability(frame), calibration.table(frame).iloc[-1]
    share = row["positives"] / row["n"]
    gap, spread = (curve["predicted"] - curve["observed"]) ** 2, (curve["observed"] - share) ** 2
    split = np.average(gap, weights=curve["n"]) - np.average(spread, weights=curve["n"])
    assert row["brier"] == pytest.approx(split + row["brier_prevalence"], abs=1e-12)  # float64 sums


def test_always_answering_the_prevalence_earns_the_brier_score_printed_beside():
    row = calibration.table(rows(np.arange(40) < 10, np.full(40, 0.25))).iloc[-1]
    assert row["brier"] == row["brier_prevalence"] == 0.25 * 0.75
    assert row["ece"] == 0 and row["sensitivity"] == 0


def loop_sensitivity(y, prob, specificity):
    """The best sensitivity of "p >= t" over every t that keeps the specificity, counted case by case."""
    best = 0
    for t in [*prob, np.inf]:
        spared = sum(p < t for p, high in zip(prob, y, strict=True) if not high)
        found = sum(p >= t for p, high in zip(prob, y, strict=True) if high)
        if spared >= specificity * (~y).sum() - 1e-9:  # a count: the slack is only for rounding
            best = max(best, found / y.sum())
    return best


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.95, 1])
def test_the_table_agrees_with_loops_over_cases(selected, specificity):
    table = calibration.table(selected, specificity).set_index([*calibration.ARM, "center"])
    assert (table["undefined"] == "").all()
    for arm, frame in arms_of(selected):
        for center in ("NYU", "AHN", "EMC", "global"):
            part = frame if center == "global" else frame[frame["center"] == center]
            y, prob = calibration.high_risk(part)
            row = table.loc[(*arm, center)]
            assert (row["n"], row["positives"]) == (len(y), sum(y))
            assert row["brier"] == pytest.approx(np.mean((prob - y) ** 2), abs=1e-12)  # float64 sums
            assert row["ece"] == calibration.expected_calibration_error(y, prob)
            expected = loop_sensitivity(y, prob, specificity)
            assert row["sensitivity"] == pytest.approx(expected, abs=1e-12)  # a ratio of counts


def test_one_false_positive_in_ten_keeps_a_specificity_of_nine_tenths():
    y, prob = [0] * 10 + [1, 1], [0.1] * 9 + [0.5, 0.6, 0.4]
    assert calibration.table(rows(y, prob), specificity=0.9)["sensitivity"].iloc[-1] == 1
    assert calibration.table(rows(y, prob), specificity=0.91)["sensitivity"].iloc[-1] == 0.5


def test_a_threshold_on_a_straight_piece_of_the_roc_curve_counts_too():
    # every tie adds a tenth to both rates: the whole curve is one straight line
    y, prob = np.tile([0, 1], 10), np.repeat(np.linspace(0.05, 0.95, 10), 2)
    assert calibration.table(rows(y, prob))["sensitivity"].iloc[-1] == 0.1


@pytest.mark.parametrize(("y", "reason"), [(0, "no high-risk case"), (1, "no other case")])
@pytest.mark.parametrize("task", ["binary", "three_class"])
def test_a_center_of_one_class_says_why_its_sensitivity_is_undefined(task, y, reason):
    high = {"binary": 1, "three_class": 2}[task]
    frame = rows([0, high], [0.2, 0.4], "NYU", task)
    other = rows([y * high, y * high], [0.3, 0.5], "AHN", task, fold=1)
    table = calibration.table(pd.concat([frame, other])).set_index("center")
    assert np.isnan(table.loc["AHN", "sensitivity"]) and table.loc["AHN", "undefined"] == reason
    assert table.loc["AHN", "brier"] == pytest.approx(np.mean((np.array([0.3, 0.5]) - y) ** 2), abs=1e-15)
    assert table.loc["AHN", "brier_prevalence"] == 0 and np.isfinite(table.loc["AHN", "ece"])
    assert table.loc[["NYU", "global"], "undefined"].tolist() == ["", ""]
    assert table.loc[["NYU", "global"], "sensitivity"].notna().all()


def test_net_benefit_agrees_with_loops_over_thresholds_and_cases(selected):
    thresholds = (0.05, 0.2, 0.33, 0.5, 0.9)
    curve = calibration.decision_curve(selected, thresholds).set_index([*calibration.ARM, "threshold"])
    for arm, frame in arms_of(selected):
        y, prob = calibration.high_risk(frame)
        for t in thresholds:
            true = sum(p >= t and high for p, high in zip(prob, y, strict=True))
            false = sum(p >= t and not high for p, high in zip(prob, y, strict=True))
            expected = true / len(y) - false / len(y) * t / (1 - t)
            ours = curve.loc[(*arm, t), "net_benefit"]
            assert ours == pytest.approx(expected, abs=1e-12)  # float64 sums


def test_treating_all_is_worth_the_prevalence_less_the_odds_of_the_rest(selected):
    curve = calibration.decision_curve(selected)
    for (task, modality), frame in selected.groupby(["task", "modality"]):
        cases = frame.drop_duplicates(["fold", "case_id"])
        share = (cases["y_true"] == {"binary": 1, "three_class": 2}[task]).mean()
        panel = curve[(curve["task"] == task) & (curve["modality"] == modality)]
        treat_all, treat_none = (panel[panel["arm"] == arm] for arm in ("treat all", "treat none"))
        t = treat_all["threshold"].to_numpy()
        expected = share - (1 - share) * t / (1 - t)
        np.testing.assert_allclose(treat_all["net_benefit"], expected, atol=1e-12)  # float64 sums
        assert (treat_none["net_benefit"] == 0).all() and len(treat_none) == 60


def test_a_threshold_above_every_score_is_worth_nothing_and_one_below_is_worth_treating_all():
    frame = rows([0, 0, 1, 1, 0], [0.3, 0.4, 0.5, 0.35, 0.5])
    curve = calibration.decision_curve(frame, [0.3, 0.5, 0.51]).set_index(["arm", "threshold"])["net_benefit"]
    assert curve["fedavg", 0.3] == curve["treat all", 0.3] == pytest.approx(0.4 - 0.6 * 3 / 7, abs=1e-15)
    assert curve["fedavg", 0.5] == 0  # one of each kind at even odds
    assert curve["fedavg", 0.51] == 0


def test_treating_all_counts_the_cases_of_every_arm_once():
    half = rows([1, 0], [0.5, 0.5], arm="fedprox_0.1")  # lacks the second fold
    whole = pd.concat([rows([1, 0], [0.5, 0.5]), rows([1, 1, 1, 1, 1, 1], [0.5] * 6, fold=1)])
    curve = calibration.decision_curve(pd.concat([half, whole]), [0.5])
    assert curve.set_index("arm").loc["treat all", "net_benefit"] == 7 / 8 - 1 / 8


@pytest.mark.parametrize("threshold", [0, 1, -0.1, np.nan])
def test_a_threshold_without_odds_is_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration.decision_curve(rows([0, 1], [0.2, 0.7]), [0.5, threshold])


@pytest.mark.parametrize("function", [calibration.reliability, calibration.table, calibration.decision_curve])
def test_a_run_of_several_epochs_is_refused_by_name(function):
    frame = rows([0, 1], [0.2, 0.7])
    both = pd.concat([frame, frame.assign(epoch=2)])
    with pytest.raises(ValueError, match=r"binary/t2/fedavg/fold0 has several epochs.*select"):
        function(both)
    function(metrics.select(both, "last"))
