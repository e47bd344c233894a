import numpy as np
import pandas as pd
import pytest
from frames import rows
from scipy.stats import binomtest

from ipmn_core import metrics
from ipmn_core.metrics import calibration

pytestmark = pytest.mark.filterwarnings("error")
ARMS = {"binary": ("fedavg", "centralized"), "multiclass": ("resnet34", "densenet121")}


def forecast(y, prob, center="NYU", task="binary", modality="t2", arm="fedavg", fold=0):
    """One run; prob (N,) of high risk, the rest going to the lower classes."""
    prob = np.asarray(prob, dtype=float)
    lower = {"binary": [1 - prob], "multiclass": [(1 - prob) / 2, (1 - prob) / 2]}[task]
    return rows(y, np.column_stack([*lower, prob]), center, task, modality, arm, fold)


@pytest.fixture(scope="module")
def selected():
    """Both tasks, modalities and several arms and folds, scores of two decimals: plenty of ties."""
    rng, frames = np.random.default_rng(0), []
    for task, arms in reversed(ARMS.items()):
        for modality in ("t2", "t1"):
            for fold in range(3):
                y = rng.integers(0, 3 if task == "multiclass" else 2, 50)
                center = rng.choice(["EMC", "NYU", "AHN"], 50)
                for arm in arms:
                    prob = np.clip(rng.normal(0.3 + 0.1 * y, 0.25), 0, 1).round(2)
                    frames.append(forecast(y, prob, center, task, modality, arm, fold))
    return pd.concat(frames, ignore_index=True)


def arms_of(selected):
    return selected.groupby(["task", "modality", "arm"])


def test_the_positive_class_is_the_last_of_either_task():
    both = pd.concat([forecast([0, 1], [0.2, 0.7]), forecast([0, 1, 2], [0.1, 0.3, 0.6], task="multiclass")])
    y, prob = calibration.positive(both[both["task"] == "binary"])  # prob_2 is NaN here
    assert y.tolist() == [False, True] and prob.tolist() == [0.2, 0.7]
    y, prob = calibration.positive(both[both["task"] == "multiclass"])
    assert y.tolist() == [False, False, True] and prob.tolist() == [0.1, 0.3, 0.6]
    with pytest.raises(ValueError, match="several tasks"):
        calibration.positive(both)


def test_a_reliability_curve_is_that_of_pandas_right_closed_bins(selected):
    curve = calibration.reliability(selected)
    errors = calibration.table(selected).query("center == 'global'").set_index(metrics.ARM)["ece"]
    for arm, frame in arms_of(selected):
        y, prob = calibration.positive(frame)
        ours = arms_of(curve).get_group(arm)
        bins = pd.cut(prob, np.linspace(0, 1, 11), labels=range(1, 11), include_lowest=True)
        members = [np.flatnonzero(bins == k) for k in np.unique(bins)]
        assert ours["bin"].tolist() == np.unique(bins).tolist()
        for row, found in zip(ours.itertuples(), members, strict=True):
            limits = binomtest(int(y[found].sum()), len(found)).proportion_ci(method="wilson")
            expected = len(found), prob[found].mean(), y[found].mean(), *limits
            numbers = row.n, row.predicted, row.observed, row.low, row.high
            assert numbers == pytest.approx(expected, abs=1e-12)  # sums in another order
        gaps = [len(m) * abs(np.mean(prob[m]) - np.mean(y[m])) for m in members]
        assert errors[arm] == pytest.approx(sum(gaps) / len(y), abs=1e-12)


def best_sensitivity(y, prob, specificity):
    """The best sensitivity of "p >= t" over every t that keeps the specificity."""
    enough = specificity * (~y).sum() - 1e-9  # a count: the slack is only for rounding
    return max((prob[y] >= t).mean() for t in [*prob, np.inf] if (prob[~y] < t).sum() >= enough)


def test_the_table_agrees_with_sums_over_cases(selected):
    table = calibration.table(selected).set_index([*metrics.ARM, "center"])
    assert (table["undefined"] == "").all()
    for arm, frame in arms_of(selected):
        for center in ("NYU", "AHN", "EMC", "global"):
            y, prob = calibration.positive(frame[(frame["center"] == center) | (center == "global")])
            row = table.loc[(*arm, center)]
            assert (row["n"], row["positives"]) == (len(y), sum(y))
            assert row["brier"] == pytest.approx(np.mean((prob - y) ** 2), abs=1e-12)  # float64 sums
            assert row["brier_prevalence"] == pytest.approx(y.var(), abs=1e-12)
            assert row["sensitivity"] == pytest.approx(best_sensitivity(y, prob, 0.9), abs=1e-12)


def test_a_threshold_at_the_specificity_itself_counts_and_so_does_one_on_a_straight_piece_of_the_curve():
    y, prob = [0] * 10 + [1, 1], [0.1] * 9 + [0.5, 0.6, 0.4]
    assert calibration.table(forecast(y, prob))["sensitivity"].iloc[-1] == 1
    # every tie adds a tenth to both rates: the whole curve is one straight line
    y, prob = np.tile([0, 1], 10), np.repeat(np.linspace(0.05, 0.95, 10), 2)
    assert calibration.table(forecast(y, prob))["sensitivity"].iloc[-1] == 0.1


@pytest.mark.parametrize(("y", "reason"), [(0, "no positive case"), (1, "no negative case")])
@pytest.mark.parametrize(("task", "high"), [("binary", 1), ("multiclass", 2)])
def test_a_center_of_one_class_says_why_its_sensitivity_is_undefined(task, high, y, reason):
    other = forecast([y * high, y * high], [0.3, 0.5], "AHN", task, fold=1)
    table = calibration.table(pd.concat([forecast([0, high], [0.2, 0.4], "NYU", task), other]))
    table = table.set_index("center")
    assert np.isnan(table.loc["AHN", "sensitivity"]) and table.loc["AHN", "undefined"] == reason
    assert table.loc["AHN", "brier_prevalence"] == 0 and np.isfinite(table.loc["AHN", "ece"])
    assert table.loc[["NYU", "global"], "undefined"].tolist() == ["", ""]
    assert table.loc[["NYU", "global"], "sensitivity"].notna().all()


def test_net_benefit_agrees_with_loops_over_thresholds_and_cases(selected):
    thresholds = (0.05, 0.2, 0.33, 0.5, 0.9)
    curve = calibration.decision_curve(selected, thresholds).set_index([*metrics.ARM, "threshold"])
    for (task, modality, arm), frame in arms_of(selected):
        y, prob = calibration.positive(frame)
        for t in thresholds:
            true = sum(p >= t and high for p, high in zip(prob, y, strict=True))
            false = sum(p >= t and not high for p, high in zip(prob, y, strict=True))
            expected = {arm: true / len(y) - false / len(y) * t / (1 - t), "treat none": 0}
            expected["treat all"] = y.mean() - (1 - y.mean()) * t / (1 - t)
            ours = {name: curve.loc[(task, modality, name, t), "net_benefit"] for name in expected}
            assert ours == pytest.approx(expected, abs=1e-12)  # float64 sums


def test_treating_all_counts_the_cases_of_every_arm_once():
    half = forecast([1, 0], [0.5, 0.5], arm="fedprox_0.1")  # lacks the second fold
    whole = pd.concat([forecast([1, 0], [0.5, 0.5]), forecast([1, 1, 1, 1, 1, 1], [0.5] * 6, fold=1)])
    curve = calibration.decision_curve(pd.concat([half, whole]), [0.5])
    assert curve.set_index("arm").loc["treat all", "net_benefit"] == 7 / 8 - 1 / 8


@pytest.mark.parametrize("threshold", [0, 1, -0.1, np.nan])
def test_a_threshold_without_odds_is_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration.decision_curve(forecast([0, 1], [0.2, 0.7]), [0.5, threshold])
