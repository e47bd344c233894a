"""Intervals for AUC and accuracy, tests between arms.

Everything here is conditional on the trained models and on the selected epoch: it says how much other test
cases, not a repeated training, would move a number. No interval contains what choosing the epoch on the test
fold adds: that is `metrics.optimism`.
"""

import numpy as np
import pandas as pd
from scipy.special import ndtri
from scipy.stats import norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from ipmn_core.metrics.scores import (
    ARM,
    GLOBAL,
    PLACES,
    RUN,
    by_fold,
    in_folds,
    kinds,
    over_folds,
    scored_classes,
    wins,
    y_and_prob,
)

STRATUM = ["center", "y_true"]  # what the cases of one bootstrap stratum share


def hanley_mcneil(auc, n_pos, n_neg, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limit of AUCs known only with their numbers of positives and negatives, cut to [0, 1].

    For published numbers without their scores: the variance is that of negative exponential scores (Hanley
    and McNeil 1982, Radiology 143:29-36). Arrays broadcast. NaN where a class is absent; a point at 0 or 1.
    """
    auc, n_pos, n_neg = (np.asarray(value, dtype=float) for value in (auc, n_pos, n_neg))
    n_pairs = np.where(n_pos * n_neg > 0, n_pos * n_neg, np.nan)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n_pos - 1) * (q1 - auc**2) + (n_neg - 1) * (q2 - auc**2)
    half = ndtri((1 + level) / 2) * np.sqrt(np.maximum(variance, 0) / n_pairs)  # rounding goes below zero
    return np.clip(auc - half, 0, 1), np.clip(auc + half, 0, 1)


def _delong(of_pos: np.ndarray, of_neg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC (A,) and its DeLong covariance (A, A) from `scores.wins`; NaN where there are too few cases."""
    n_pos, n_neg, n_arms = len(of_pos), len(of_neg), of_pos.shape[1]
    covariance = np.full((n_arms, n_arms), np.nan)
    if min(n_pos, n_neg) == 0:
        return np.full(n_arms, np.nan), covariance
    if min(n_pos, n_neg) > 1:
        s_pos, s_neg = (np.cov(of, rowvar=False).reshape(n_arms, n_arms) for of in (of_pos, of_neg))
        covariance = s_pos / (n_pos * n_neg**2) + s_neg / (n_neg * n_pos**2)
    return of_pos.mean(axis=0) / n_neg, covariance


def delong(y, scores) -> tuple[np.ndarray, np.ndarray]:
    """AUC (A,) and covariance (A, A) of A scores (N, A) of the same cases with labels 0/1 (N,).

    DeLong et al. 1988, Biometrics 44:837-845. NaN: both where a class has no case, the covariance where a
    class has one.
    """
    return _delong(*wins(np.asarray(y) == 1, scores))


def auc_interval(y, score, level: float = 0.95) -> tuple[float, float, float]:
    """AUC of one score (N,) for labels 0/1 (N,) and its DeLong interval, cut to [0, 1] as pROC does.

    A perfect AUC has DeLong variance zero, so [1, 1]: a limit of the method, not certainty.
    """
    (auc,), covariance = delong(y, np.asarray(score)[:, None])
    half = ndtri((1 + level) / 2) * np.sqrt(covariance[0, 0])
    return float(auc), float(np.clip(auc - half, 0, 1)), float(np.clip(auc + half, 0, 1))


def _over_error(value: float, error: float) -> float:
    """Value over its standard error: 0 for 0 / 0, infinite for another value without error, no warning."""
    return value / error if error else (np.copysign(np.inf, value) if value else 0.0)


def delong_test(y, a, b, level: float = 0.95) -> tuple[float, float, float, float, float]:
    """Difference of the AUCs of scores a and b (N,) of the same cases, its limits, z and two-sided p.

    Paired test of DeLong et al. 1988, as pROC's `roc.test`: equal scores give difference 0, z 0, p 1; a
    difference without variance gives an infinite z and p 0. NaN where a class has fewer than two cases.
    """
    won = wins(np.asarray(y) == 1, np.column_stack([a, b]))
    (difference,), covariance = _delong(*(of[:, :1] - of[:, 1:] for of in won))
    error = np.sqrt(covariance[0, 0])
    z, half = _over_error(difference, error), ndtri((1 + level) / 2) * error
    return tuple(map(float, (difference, difference - half, difference + half, z, 2 * norm.sf(abs(z)))))


def wilson(correct, n, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper Wilson limit of the accuracy of `correct` out of `n` cases; NaN for n = 0.

    Arrays broadcast. Wilson 1927, J. Am. Stat. Assoc. 22:209-212.
    """
    n = np.where(np.asarray(n) > 0, n, np.nan)
    return proportion_confint(np.asarray(correct), n, alpha=1 - level, method="wilson")


def corrected_t(differences, test_over_train: float) -> tuple[float, float]:
    """Corrected resampled t and its two-sided p for J differences, one a fold, with J - 1 degrees of freedom.

    Nadeau and Bengio 2003, Machine Learning 52:239-281: the variance factor 1/J becomes 1/J + n_test/n_train,
    for training sets overlap. NaN for fewer than two folds. Differences that are all equal have no variance:
    t = 0, p = 1 if they are zero, else t is infinite and p = 0.
    """
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    if n < 2:
        return np.nan, np.nan
    # the variance of equal numbers may round to more than zero
    variance = differences.var(ddof=1) if np.ptp(differences) else 0.0
    statistic = _over_error(differences.mean(), np.sqrt(variance * (1 / n + test_over_train)))
    return float(statistic), float(2 * t.sf(abs(statistic), n - 1))


def holm(p_values) -> np.ndarray:
    """p-values (M,) adjusted by Holm 1979 for the family of those that are not NaN; NaN stays NaN."""
    adjusted = np.array(p_values, dtype=float)
    tested = ~np.isnan(adjusted)
    if tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method="holm")[1]
    return adjusted


def weighted_auc(y, prob, weights) -> np.ndarray:
    """AUC (B,) of B resamples given as weights (B, N), how often each case is drawn; else as `metrics.auc`.

    `scores.wins` with weights, for speed: from running sums over the sorted scores, O(B N) in place of B
    sorts. NaN where a class is absent.
    """
    aucs = []
    for k in scored_classes(prob):
        values, place = np.unique(prob[:, k], return_inverse=True)
        order = np.argsort(place, kind="stable")
        first = np.searchsorted(place[order], np.arange(len(values)))  # of the cases with each score
        pos, neg = (np.add.reduceat((weights * of)[:, order], first, axis=1) for of in (y == k, y != k))
        n_pairs = pos.sum(axis=1) * neg.sum(axis=1)
        won = (pos * (neg.cumsum(axis=1) - neg / 2)).sum(axis=1)
        aucs.append(won / np.where(n_pairs > 0, n_pairs, np.nan))
    return np.mean(aucs, axis=0)


def resampled_auc(rows: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """AUC, mean over folds, of each bootstrap resample (n_resamples,) of one arm's test cases.

    `rows` are one task, modality and arm, one epoch a run, all centers or one. Cases are drawn with
    replacement within center x label, over the folds; a fold without every class is left out of the mean, as
    in `metrics.over_folds`; NaN if no fold has every class. Arms with the same cases and seed get the same
    resamples.
    """
    rows, rng = rows.sort_values("case_id", kind="stable"), np.random.default_rng(seed)
    y, prob = y_and_prob(rows)
    weights = np.empty((n_resamples, len(rows)))
    for index in rows.groupby(STRATUM).indices.values():
        n = len(index)
        weights[:, index] = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)
    folds = [weighted_auc(y[i], prob[i], weights[:, i]) for i in rows.groupby("fold").indices.values()]
    defined = (~np.isnan(folds)).sum(axis=0)
    return np.nansum(folds, axis=0) / np.where(defined, defined, np.nan)


def bootstrap_auc(
    rows: pd.DataFrame, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile limits of the mean over folds of the AUC of one arm, by `resampled_auc`.

    Efron and Tibshirani 1993, chapter 13. Simulated coverage of 95 % limits (tests/metrics/proc/coverage.py)
    with the paper's T2 counts: global 91 %, NYU 96 %, AHN 90 %; with at most 5 cases per center and label:
    88 %, 90 %, 74 %: too narrow. DeLong's cover 93, 95, 85 % and 90, 85, 85 %. NaN where no AUC is defined or
    every stratum is one case, so that there is nothing to resample.
    """
    if rows.groupby(STRATUM).size().max() == 1:
        return np.nan, np.nan
    tails = [(1 - level) / 2, (1 + level) / 2]
    aucs = resampled_auc(rows, n_resamples, seed)
    low, high = np.quantile(aucs[~np.isnan(aucs)], tails) if not np.isnan(aucs).all() else (np.nan, np.nan)
    return float(low), float(high)


def no_delong(y: np.ndarray, n_classes: int, result: str) -> str:
    """Why labels y (N,) give no DeLong `result` although no class need be absent; "" if they give one."""
    if n_classes > 2:
        return f"macro AUC has no DeLong {result}"
    single = [name for k, name in enumerate(kinds(2)) if (y == k).sum() == 1]
    return f"one {' and one '.join(single)} case: too few for a DeLong {result}" if single else ""


def _ordered(table: pd.DataFrame, selected: pd.DataFrame) -> pd.DataFrame:
    """`table` by task, modality and arm as they first appear in `selected`, then by center, global last."""
    orders = {key: list(selected[key].unique()) for key in ARM} | {"center": PLACES}
    keys = [key for key in orders if key in table]
    return table.sort_values(keys, key=lambda names: names.map(orders[names.name].index), ignore_index=True)


def intervals(
    selected: pd.DataFrame, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """AUC and accuracy of every arm at each center and globally, each with its interval.

    Columns task, modality, arm, center, n, positives (of the highest class); auc, auc_low, auc_high: mean
    over folds as in `metrics.over_folds`, limits of `bootstrap_auc`; pooled_auc, pooled_low, pooled_high:
    out-of-fold scores of all folds together with DeLong's limits, binary task only, another number than `auc`
    as the models of the folds need not share a scale; acc, acc_low, acc_high: all cases together, Wilson;
    undefined: why a number is NaN or which folds it leaves out, "" if none. Raises ValueError if a run has
    several epochs.
    """
    means = over_folds(by_fold(selected)).set_index([*ARM, "center"])
    rows = []
    for arm, frame in selected.groupby(ARM, sort=False):
        for center, part in [*frame.groupby("center"), (GLOBAL, frame)]:
            mean = means.loc[(*arm, center)]
            (y, prob), auc = y_and_prob(part), mean["auc_mean"]
            n, n_classes = prob.shape
            correct = int((prob.argmax(axis=1) == y).sum())
            limits = bootstrap_auc(part, n_resamples, seed, level)
            pooled = auc_interval(y, prob[:, 1], level) if n_classes == 2 else (np.nan,) * 3
            accuracy = correct / n, *map(float, wilson(correct, n, level))
            stuck = np.isnan(limits[0]) and not np.isnan(auc)
            lone = "one case per center and label: nothing for the bootstrap to draw" if stuck else ""
            reasons = filter(None, (mean["undefined"], lone, no_delong(y, n_classes, "interval")))
            numbers = n, int((y == n_classes - 1).sum()), auc, *limits, *pooled, *accuracy
            rows.append((*arm, center, *numbers, "; ".join(reasons)))
    limits = [f"{name}_{end}" for name in ("auc", "pooled", "acc") for end in ("low", "high")]
    numbers = ["n", "positives", "auc", *limits[:2], "pooled_auc", *limits[2:4], "acc", *limits[4:]]
    return _ordered(pd.DataFrame(rows, columns=[*ARM, "center", *numbers, "undefined"]), selected)


def paired(arm: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Rows of two arms side by side, one per case: fold, center, case_id, y_true, prob_1, prob_1_reference.

    Raises ValueError naming the first case that only one arm was tested on.
    """
    keys = ["fold", "case_id", "center", "y_true"]
    how = {"how": "outer", "suffixes": ("", "_reference"), "indicator": True, "validate": "one_to_one"}
    pairs = arm[[*keys, "prob_1"]].merge(reference[[*keys, "prob_1"]], on=keys, **how)
    lone = pairs[pairs["_merge"] != "both"]
    if len(lone):
        case, (task, modality) = lone.iloc[0], arm[["task", "modality"]].iloc[0]
        names = [rows["arm"].iloc[0] for rows in (arm, reference)]
        tested, untested = names if case["_merge"] == "left_only" else names[::-1]
        raise ValueError(
            f"Case {case['case_id']} of {task}/{modality} (fold {case['fold']}, label {case['y_true']}) was "
            f"tested by {tested}, not by {untested}: arms are compared case by case, so repeat one of them "
            "with the cohort and folds of the other."
        )
    return pairs


def compare_arms(
    selected: pd.DataFrame, reference: str = "centralized", inner_validation: float = 0.0
) -> pd.DataFrame:
    """Every arm against `reference`, paired by case, globally; tasks without the reference are left out.

    Columns task, modality, arm, reference; difference, low, high, z, p_delong: arm minus reference, DeLong's
    paired test of the pooled out-of-fold scores (two classes only); fold_difference, t, p_corrected: mean
    over folds of the difference in global AUC and the corrected t-test, n_test/n_train = 1/(folds - 1), or
    more where a share `inner_validation` of each training fold was held out; p_delong_holm, p_corrected_holm:
    Holm over all rows of this table; undefined: why a number is NaN or which folds it leaves out. Raises
    ValueError naming the first case that only one of two arms was tested on, or if a run has several epochs.
    """
    # as if all were one center: the numbers of the others are not needed
    everywhere = by_fold(selected.assign(center=GLOBAL)).drop_duplicates(RUN)
    folds = {arm: rows.set_index("fold", drop=False) for arm, rows in everywhere.groupby(ARM)}
    rows = []
    for (task, modality), frame in selected.groupby(["task", "modality"], sort=False):
        arms = dict(list(frame.groupby("arm", sort=False)))
        n_classes = y_and_prob(frame)[1].shape[1]
        for name in (name for name in arms if reference in arms and name != reference):
            pairs = paired(arms[name], arms[reference])
            y, tested = pairs["y_true"].to_numpy(), (np.nan,) * 5
            if n_classes == 2:
                tested = delong_test(y, pairs["prob_1"], pairs["prob_1_reference"])
            mine = folds[task, modality, name]
            of_fold = mine["auc"] - folds[task, modality, reference]["auc"]
            defined = of_fold.dropna()
            test_over_train = 1 / max(len(of_fold) - 1, 1) / (1 - inner_validation)
            corrected = defined.mean(), *corrected_t(defined, test_over_train)
            few = "corrected t needs two folds" if len(defined) < 2 else ""
            reasons = filter(None, (in_folds(mine), no_delong(y, n_classes, "test"), few))
            rows.append((task, modality, name, reference, *tested, *corrected, "; ".join(reasons)))
    columns = [*ARM, "reference", "difference", "low", "high", "z", "p_delong", "fold_difference", "t"]
    table = _ordered(pd.DataFrame(rows, columns=[*columns, "p_corrected", "undefined"]), selected)
    for name in ("p_delong", "p_corrected"):
        table.insert(table.columns.get_loc("undefined"), f"{name}_holm", holm(table[name]))
    return table
