"""Does a predicted probability of high risk mean what it says, and is it good to act on it?

Everything is a pure function of predictions with one epoch per run (see `metrics.select`; ValueError if a run
has several). The test folds are pooled, so each case counts once, forecast by the network that never saw it;
folds are different networks, and pooling them judges the recipe, not one of them.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import brier_score_loss, roc_curve
from statsmodels.stats.proportion import proportion_confint

from ipmn_core.metrics import scores
from ipmn_core.metrics.scores import ARM, GLOBAL, PLACES

TREAT_ALL, TREAT_NONE = "treat all", "treat none"


def high_risk(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which cases are of high risk (N,) bool, and its predicted probability (N,), for rows of one task.

    High risk is the highest class: 1 of the binary task, 2 of the three-class task. Raises ValueError as
    `scores.y_and_prob` does.
    """
    y, prob = scores.y_and_prob(frame)
    high = prob.shape[1] - 1
    return y == high, prob[:, high]


def _arms(selected: pd.DataFrame):
    """(task, modality, arm) and its rows, arms in order of appearance within task and modality."""
    for (task, modality), rows in scores.one_epoch(selected).groupby(["task", "modality"]):
        for arm, part in rows.groupby("arm", sort=False):
            yield (task, modality, arm), part


def _bins(y: np.ndarray, prob: np.ndarray, bins: int) -> pd.DataFrame:
    """Cases, positives, mean probability and observed share of each bin of equal width that has a case."""
    # right-closed as in Guo et al. 2017: bin 1 is [0, 1/bins], bin 2 is (1/bins, 2/bins], ...
    number = 1 + np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], prob)
    groups = pd.DataFrame({"bin": number, "predicted": prob, "observed": y.astype(float)}).groupby("bin")
    return groups.mean().assign(n=groups.size(), positives=groups["observed"].sum()).reset_index()


def reliability(selected: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Predicted probability of high risk against its observed share, in bins of equal width.

    Columns task, modality, arm, bin (from 1), n, predicted (mean probability), observed (share of high risk),
    low, high (its Wilson 95 % interval; Wilson, JASA 1927;22:209). Bins without a case are left out.
    """
    found = {arm: _bins(*high_risk(rows), bins) for arm, rows in _arms(selected)}
    curve = pd.concat(found, names=ARM).reset_index(ARM).reset_index(drop=True)
    curve["low"], curve["high"] = proportion_confint(curve["positives"], curve["n"], method="wilson")
    return curve[[*ARM, "bin", "n", "predicted", "observed", "low", "high"]]


def expected_calibration_error(y, prob, bins: int = 10) -> float:
    """Mean over cases of |observed share - mean probability| in the bin of the case, bins of equal width.

    Guo et al., ICML 2017, Eq. (3), there for the confidence in the top class, here for the probability (N,)
    of high risk against y (N,) bool. Few cases raise it: even a perfect forecast has an error above 0.
    """
    found = _bins(np.asarray(y, dtype=bool), np.asarray(prob, dtype=float), bins)
    return float(np.average((found["observed"] - found["predicted"]).abs(), weights=found["n"]))


def table(selected: pd.DataFrame, specificity: float = 0.9, bins: int = 10) -> pd.DataFrame:
    """Calibration and use of every arm at each center and globally.

    Columns task, modality, arm, center (with "global"), n, positives, brier (mean squared error of the
    probability; Brier, Mon Weather Rev 1950;78:1), brier_prevalence (that of always answering the share of
    high risk found there: a calibrated forecast that tells no case from another), ece (see
    `expected_calibration_error`), sensitivity (the highest of a threshold that keeps at least the given
    specificity; chosen on the cases it is reported on, so an upper bound), undefined (why the sensitivity is
    NaN, else "").
    """
    rows = []
    for arm, frame in _arms(selected):
        parts = dict(list(frame.groupby("center"))) | {GLOBAL: frame}
        for center in sorted(parts, key=PLACES.index):
            y, prob = high_risk(parts[center])
            share, undefined = y.mean(), scores.absent_classes(y, 2)
            errors = brier_score_loss(y, prob, pos_label=True), share * (1 - share)
            ece = expected_calibration_error(y, prob, bins)
            sensitivity = np.nan if undefined else _sensitivity(y, prob, specificity)
            rows.append((*arm, center, len(y), int(y.sum()), *errors, ece, sensitivity, undefined))
    numbers = ["n", "positives", "brier", "brier_prevalence", "ece", "sensitivity", "undefined"]
    return pd.DataFrame(rows, columns=[*ARM, "center", *numbers])


def _sensitivity(y: np.ndarray, prob: np.ndarray, specificity: float) -> float:
    # a collinear point may be the very one that keeps the specificity: drop none
    false, true, _ = roc_curve(y, prob, drop_intermediate=False)
    return true[1 - false >= specificity].max()  # in float64, 1/10 <= 1 - 9/10 would be untrue


def decision_curve(selected: pd.DataFrame, thresholds=np.linspace(0.01, 0.6, 60)) -> pd.DataFrame:  # noqa: B008
    """Net benefit of acting on every case whose probability of high risk reaches a threshold.

    Columns task, modality, arm, threshold, net_benefit: TP/n - FP/n * t / (1 - t), in true positives per case
    (Vickers and Elkin, Med Decis Making 2006;26:565). The threshold t states the exchange rate: to act at 0.1
    accepts nine needless operations for one that was needed. "treat all" and "treat none" act on every case
    and on none. Raises ValueError if a threshold is not between 0 and 1.
    """
    t = np.asarray(thresholds, dtype=float)
    if not ((t > 0) & (t < 1)).all():
        raise ValueError("A threshold is strictly between 0 and 1: its odds weigh the harm.")
    curves = {arm: _net_benefit(*high_risk(rows), t) for arm, rows in _arms(selected)}
    for (task, modality), rows in selected.groupby(["task", "modality"]):
        y, _ = high_risk(rows.drop_duplicates(["fold", "case_id"]))  # the cases of all arms, each once
        curves[task, modality, TREAT_ALL] = _net_benefit(y, np.ones(len(y)), t)
        curves[task, modality, TREAT_NONE] = _net_benefit(y, np.zeros(len(y)), t)
    found = {arm: pd.DataFrame({"threshold": t, "net_benefit": curve}) for arm, curve in curves.items()}
    long = pd.concat(found, names=ARM).reset_index(ARM)
    return long.sort_values(["task", "modality"], kind="stable", ignore_index=True)


def _net_benefit(y: np.ndarray, prob: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Net benefit (T,) at thresholds t (T,) for y (N,) bool and probabilities (N,)."""
    act = prob[:, None] >= t  # (N, T)
    return (act & y[:, None]).mean(axis=0) - (act & ~y[:, None]).mean(axis=0) * t / (1 - t)
