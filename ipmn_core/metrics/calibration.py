"""Calibration of the positive class's predicted probability, and the benefit of acting on it.

Functions of predictions with one epoch per run (see `metrics.select`; ValueError if a run has several). Test
folds are pooled: each case counts once, predicted by the network that never saw it.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import brier_score_loss, roc_curve
from statsmodels.stats.proportion import proportion_confint

from ipmn_core.metrics import scores
from ipmn_core.metrics.scores import ARM

BINS = 10  # of equal width
SPECIFICITY = 0.9
TREAT_ALL, TREAT_NONE = "treat all", "treat none"


def positive(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Whether each case is of the last class (binary: positive), (N,) bool, and that class's probability."""
    y, prob = scores.y_and_prob(frame)
    high = prob.shape[1] - 1
    return y == high, prob[:, high]


def bins(y: np.ndarray, prob: np.ndarray) -> pd.DataFrame:
    """Mean probability, observed share, cases and positives of each bin with cases."""
    # right-closed as in Guo et al. 2017: bin 1 is [0, 1/BINS], bin 2 is (1/BINS, 2/BINS], ...
    number = 1 + np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], prob)
    groups = pd.DataFrame({"bin": number, "predicted": prob, "observed": y.astype(float)}).groupby("bin")
    return groups.mean().assign(n=groups.size(), positives=groups["observed"].sum()).reset_index()


def reliability(selected: pd.DataFrame) -> pd.DataFrame:
    """Predicted probability of the positive class against its observed share, in bins of equal width.

    Columns task, modality, arm, bin (from 1), n, predicted (mean probability), observed (share of positives),
    low, high (its Wilson 95 % interval). Empty bins are left out.
    """
    found = {arm: bins(*positive(rows)) for arm, rows in scores.arms(selected)}
    curve = pd.concat(found, names=ARM).reset_index()
    curve["low"], curve["high"] = proportion_confint(curve["positives"], curve["n"], method="wilson")
    return curve[[*ARM, "bin", "n", "predicted", "observed", "low", "high"]]


def table(selected: pd.DataFrame) -> pd.DataFrame:
    """Calibration and sensitivity of every arm at each center and globally.

    Columns task, modality, arm, center (with "global"), n, positives, and

    - brier: mean squared error of the probability (Brier, Mon Weather Rev 1950;78:1)
    - brier_prevalence: that of always answering the share of positives in these cases
    - ece: expected calibration error (Guo et al., ICML 2017, Eq. (3), there for the top class); few cases
      raise it
    - sensitivity: the highest at a specificity of at least 90 %; an upper bound, because the threshold is
      chosen on the same cases
    - undefined: why the sensitivity is NaN
    """
    rows = []
    for arm, frame in scores.arms(selected):
        for center, part in scores.places(frame):
            y, prob = positive(part)
            share, undefined, found = y.mean(), scores.absent_classes(y, 2), bins(y, prob)
            errors = brier_score_loss(y, prob, pos_label=True), share * (1 - share)
            ece = np.average((found["observed"] - found["predicted"]).abs(), weights=found["n"])
            sensitivity = np.nan if undefined else _sensitivity(y, prob)
            rows.append((*arm, center, len(y), y.sum(), *errors, ece, sensitivity, undefined))
    numbers = ["n", "positives", "brier", "brier_prevalence", "ece", "sensitivity", "undefined"]
    return pd.DataFrame(rows, columns=[*ARM, "center", *numbers])


def _sensitivity(y: np.ndarray, prob: np.ndarray) -> float:
    # drop no collinear point: it may be the one that keeps the specificity
    false, true, _ = roc_curve(y, prob, drop_intermediate=False)
    return true[1 - false >= SPECIFICITY].max()  # in float64, 1/10 <= 1 - 9/10 is false


def decision_curve(selected: pd.DataFrame, thresholds=np.linspace(0.01, 0.6, 60)) -> pd.DataFrame:  # noqa: B008
    """Net benefit of acting on each case whose probability of the positive class reaches a threshold.

    Columns task, modality, arm (also "treat all", "treat none"), threshold, net_benefit: TP/n - FP/n * t /
    (1 - t), in true positives per case (Vickers and Elkin, Med Decis Making 2006;26:565). Raises ValueError
    for a threshold that is not between 0 and 1.
    """
    t = np.asarray(thresholds, dtype=float)
    if not ((t > 0) & (t < 1)).all():
        raise ValueError("A threshold must be strictly between 0 and 1: its odds weigh the harm.")
    curves = {arm: _net_benefit(*positive(rows), t) for arm, rows in scores.arms(selected)}
    for (task, modality), rows in selected.groupby(["task", "modality"], sort=False):
        y, _ = positive(rows.drop_duplicates(["fold", "case_id"]))  # the cases of all arms, each once
        curves[task, modality, TREAT_ALL] = _net_benefit(y, np.ones(len(y)), t)
        curves[task, modality, TREAT_NONE] = _net_benefit(y, np.zeros(len(y)), t)
    found = {arm: pd.DataFrame({"threshold": t, "net_benefit": curve}) for arm, curve in curves.items()}
    return pd.concat(found, names=ARM).reset_index(ARM).reset_index(drop=True)


def _net_benefit(y: np.ndarray, prob: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Net benefit (T,) at thresholds t (T,) for y (N,) bool and probabilities (N,)."""
    act = prob[:, None] >= t  # (N, T)
    return (act & y[:, None]).mean(axis=0) - (act & ~y[:, None]).mean(axis=0) * t / (1 - t)
