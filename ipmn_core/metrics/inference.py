"""Intervals for AUC and accuracy, and tests between arms.

They take the trained models and the selected epoch as given and say how much other test cases would change a
number. `metrics.optimism` measures what choosing the epoch on the test fold adds.
"""

from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.stats import norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from ipmn_core.metrics import scores
from ipmn_core.metrics.scores import ARM, GLOBAL, ordered, y_and_prob
from ipmn_core.names import fusion

STRATUM = ["center", "y_true"]  # columns that define a bootstrap stratum
Z = norm.ppf(0.975)  # for 95 % intervals


def hanley_mcneil(auc, n_pos, n_neg) -> tuple[np.ndarray, np.ndarray]:
    """95 % limits of AUCs, from the AUC and the numbers of positives and negatives; cut to [0, 1].

    Hanley and McNeil 1982, Radiology 143:29-36: the variance is that of negative exponential scores. Arrays
    broadcast. NaN where a class is absent; at an AUC of 0 or 1 both limits equal it.
    """
    auc, n_pos, n_neg = (np.asarray(value, dtype=float) for value in (auc, n_pos, n_neg))
    n_pairs = np.where(n_pos * n_neg > 0, n_pos * n_neg, np.nan)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n_pos - 1) * (q1 - auc**2) + (n_neg - 1) * (q2 - auc**2)
    half = Z * np.sqrt(np.maximum(variance, 0) / n_pairs)  # rounding may give less than zero
    return np.clip(auc - half, 0, 1), np.clip(auc + half, 0, 1)


def delong(right: np.ndarray) -> tuple[float, float]:
    """AUC and standard error of one score, from `scores.ordered`; for two scores, from their difference.

    DeLong et al. 1988, Biometrics 44:837-845. The error is NaN if a class has fewer than two cases, the AUC
    if a class has none.
    """
    n_pos, n_neg = right.shape
    auc = right.mean() if right.size else np.nan
    if min(n_pos, n_neg) < 2:
        return auc, np.nan
    variances = right.mean(axis=1).var(ddof=1) / n_pos, right.mean(axis=0).var(ddof=1) / n_neg
    return auc, np.sqrt(sum(variances))


def auc_interval(y, score) -> tuple[float, float, float]:
    """AUC of one score (N,) for labels 0/1 (N,) and its DeLong 95 % limits, cut to [0, 1] as pROC does.

    A perfect AUC has variance zero and so the limits [1, 1]: a limitation of the method, not certainty.
    """
    auc, error = delong(ordered(np.asarray(y) == 1, score))
    return tuple(np.clip([auc, auc - Z * error, auc + Z * error], 0, 1).tolist())


def _over_error(value: float, error: float) -> float:
    """Value over its standard error: 0 for 0 / 0, infinite for any other value without error."""
    return value / error if error else (np.copysign(np.inf, value) if value else 0.0)


def delong_test(y, a, b) -> tuple[float, float, float, float, float]:
    """AUC of score a minus AUC of score b (N,) on the same cases, 95 % limits, z and two-sided p.

    Paired test of DeLong et al. 1988, as pROC's `roc.test`. NaN if a class has fewer than two cases.
    """
    positive = np.asarray(y) == 1
    difference, error = delong(ordered(positive, a) - ordered(positive, b))
    z = _over_error(difference, error)
    low, high = difference - Z * error, difference + Z * error
    return tuple(map(float, (difference, low, high, z, 2 * norm.sf(abs(z)))))


def corrected_t(differences, test_over_train: float) -> tuple[float, float]:
    """Corrected resampled t and its two-sided p for J differences, one per fold; J - 1 degrees of freedom.

    Nadeau and Bengio 2003, Machine Learning 52:239-281: the variance factor is 1/J + n_test/n_train instead
    of 1/J, because training sets overlap. NaN for fewer than two folds; without variance t is 0 or infinite.
    """
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    if n < 2:
        return np.nan, np.nan
    # the variance of equal numbers may round to more than zero
    variance = differences.var(ddof=1) if np.ptp(differences) else 0.0
    statistic = _over_error(differences.mean(), np.sqrt(variance * (1 / n + test_over_train)))
    return float(statistic), float(2 * t.sf(abs(statistic), n - 1))


def resampled_auc(rows: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """AUC, mean over folds, of each bootstrap resample (n_resamples,) of one arm's test cases.

    `rows` have one epoch per run. Cases are drawn with replacement within center x label, over all folds. The
    mean leaves out folds in which a class is absent, as `metrics.over_folds` does; NaN if none is left. Arms
    with the same cases and seed get the same resamples.
    """
    rows = rows.sort_values("case_id", kind="stable")
    y, prob = y_and_prob(rows)
    weights = _drawn(tuple(_strata(rows)), n_resamples, seed)
    folds = [scores.weighted_auc(y[i], prob[i], weights[:, i]) for i in rows.groupby("fold").indices.values()]
    defined = (~np.isnan(folds)).sum(axis=0)
    return np.nansum(folds, axis=0) / np.where(defined, defined, np.nan)


def _strata(rows: pd.DataFrame) -> np.ndarray:
    """The number of each row's stratum: cases of one center and label (N,)."""
    y = rows["y_true"].to_numpy()
    return pd.factorize(rows["center"], sort=True)[0] * (y.max() + 1) + y


@lru_cache(maxsize=64)  # arms and rules share the draws at a center
def _drawn(strata: tuple[int, ...], n_resamples: int, seed: int) -> np.ndarray:
    """How often each case is drawn in each resample, within its stratum: (n_resamples, N)."""
    rng, weights = np.random.default_rng(seed), np.empty((n_resamples, len(strata)), np.float32)
    for stratum in sorted(set(strata)):
        index = np.flatnonzero(np.equal(strata, stratum))
        n = len(index)
        weights[:, index] = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return weights


def bootstrap_auc(rows: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Limits of one arm's AUC, mean over folds: percentiles 2.5 and 97.5 of `resampled_auc`.

    Efron and Tibshirani 1993, chapter 13. Coverage in 2,000 simulated cohorts
    (tests/metrics/proc/coverage.py) with the paper's T2 counts: global 92.6 %, NYU 93.6 %, AHN 91.3 %, each
    ± 0.6 % (standard error). With at most 5 cases per center and label: 93.1 %, 89.6 %, 76.2 %, so intervals
    of small centers are too narrow. NaN if no AUC is defined, or if every stratum has one case.
    """
    aucs = resampled_auc(rows, n_resamples, seed)
    aucs = aucs[~np.isnan(aucs)]
    if len(aucs) == 0 or np.bincount(_strata(rows)).max() == 1:
        return np.nan, np.nan
    low, high = np.quantile(aucs, [0.025, 0.975])
    return float(low), float(high)


def no_delong(y: np.ndarray, n_classes: int) -> str:
    """Why labels y (N,) with a case of each class give no DeLong interval or test; "" if they do."""
    if n_classes > 2:
        return "DeLong is for two classes"
    return "DeLong needs two cases of each class" if 1 in np.bincount(y) else ""


def intervals(selected: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """AUC and accuracy of every arm at each center and globally, each with its 95 % interval.

    Columns task, modality, arm, center, n, positives (of the highest class), and

    - auc, auc_low, auc_high: mean over folds, `bootstrap_auc`
    - pooled_auc, pooled_low, pooled_high: scores of all folds together, binary task, DeLong (the folds'
      models need not share a scale)
    - acc, acc_low, acc_high: all cases together, Wilson (J. Am. Stat. Assoc. 1927;22:209)
    - undefined: why a number is NaN or which folds it leaves out

    Raises ValueError if a run has several epochs.
    """
    means = scores.over_folds(scores.by_fold(selected)).set_index([*ARM, "center"])
    rows = []
    for arm, frame in scores.arms(selected):
        for center, part in scores.places(frame):
            mean = means.loc[(*arm, center)]
            (y, prob), auc = y_and_prob(part), mean["auc_mean"]
            n, n_classes = prob.shape
            correct = int((prob.argmax(axis=1) == y).sum())
            limits = bootstrap_auc(part, n_resamples, seed)
            pooled = auc_interval(y, prob[:, 1]) if n_classes == 2 else (np.nan,) * 3
            accuracy = correct / n, *proportion_confint(correct, n, method="wilson")
            stuck = np.isnan(limits[0]) and not np.isnan(auc)
            lone = "one case per center and label: nothing for the bootstrap to draw" if stuck else ""
            reasons = filter(None, (mean["undefined"], lone, no_delong(y, n_classes)))
            numbers = n, int((y == n_classes - 1).sum()), auc, *limits, *pooled, *accuracy
            rows.append((*arm, center, *numbers, "; ".join(reasons)))
    aucs = ["auc", "auc_low", "auc_high", "pooled_auc", "pooled_low", "pooled_high"]
    columns = [*ARM, "center", "n", "positives", *aucs, "acc", "acc_low", "acc_high", "undefined"]
    return pd.DataFrame(rows, columns=columns)


def paired(arm: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """One row per case of two arms: fold, center, case_id, y_true, prob_1, prob_1_reference.

    Raises ValueError naming the first case on which only one arm was tested.
    """
    keys = ["fold", "case_id", "center", "y_true"]
    how = {"how": "outer", "suffixes": ("", "_reference"), "indicator": True, "validate": "one_to_one"}
    pairs = arm[[*keys, "prob_1"]].merge(reference[[*keys, "prob_1"]], on=keys, **how)
    lone = pairs[pairs["_merge"] != "both"]
    if len(lone):
        case, (task, modality) = lone.iloc[0], arm[["task", "modality"]].iloc[0]
        tested = (arm if case["_merge"] == "left_only" else reference)["arm"].iloc[0]
        raise ValueError(
            f"Case {case['case_id']} of {task}/{modality} (fold {case['fold']}, label {case['y_true']}) was "
            f"tested only by {tested}: arms are compared case by case, so repeat one of them with the "
            "cohort and folds of the other."
        )
    return pairs


def not_paired(arm: pd.DataFrame, reference: pd.DataFrame) -> str:
    """Why weights from elsewhere cannot be compared with another arm case by case; "" if they can."""
    if scores.AS_GIVEN not in {*arm["epoch"], *reference["epoch"]}:
        return ""
    cases = [set(zip(rows["fold"], rows["case_id"], strict=True)) for rows in (arm, reference)]
    return "" if cases[0] == cases[1] else "not tested on the same cases in the same folds"


def compare_modalities(
    selected: pd.DataFrame, scans: pd.DataFrame, reference: str, inner_validation: float = 0.0
) -> pd.DataFrame:
    """Every modality against the modality `reference`, paired by patient, as `compare_arms` compares arms.

    `scans` are those of a paired cohort. Columns as in `compare_arms`, with `modality` and `arm` exchanged.
    Raises ValueError as `paired`.
    """
    patients = scans.set_index(["modality", "case_id"])["patient_id"]
    of = [fusion(modality)[0][-1] for modality in selected["modality"]]  # a fused row has the last one's case
    keys = pd.MultiIndex.from_arrays([of, selected["case_id"]])
    exchanged = {"arm": "modality", "modality": "arm"}
    rows = selected.assign(case_id=patients.loc[keys].to_numpy()).rename(columns=exchanged)
    return compare_arms(rows, reference, inner_validation).rename(columns=exchanged)


def compare_arms(
    selected: pd.DataFrame, reference: str = "centralized", inner_validation: float = 0.0
) -> pd.DataFrame:
    """Every arm against `reference`, paired by case, globally; tasks without the reference are left out.

    Columns task, modality, arm, reference, and

    - difference, low, high, z, p_delong: arm minus reference, pooled scores, `delong_test` (two classes only)
    - fold_difference, t, p_corrected: mean over folds and `corrected_t` with n_test/n_train = 1/(folds - 1),
      or more if a share `inner_validation` of each training fold was held out
    - p_delong_holm, p_corrected_holm: Holm over all rows of this table
    - undefined: as in `intervals`, or `not_paired`

    Raises ValueError as `paired`, and if a run has several epochs.
    """
    # only the global numbers are needed, so all cases form one center
    by_fold = scores.by_fold(selected.assign(center=GLOBAL))
    folds = {arm: rows.set_index("fold", drop=False) for arm, rows in by_fold.groupby(ARM)}
    rows = []
    for (task, modality), frame in selected.groupby(["task", "modality"], sort=False):
        arms = dict(list(frame.groupby("arm", sort=False)))
        n_classes = y_and_prob(frame)[1].shape[1]
        for name in (name for name in arms if reference in arms and name != reference):
            if why := not_paired(arms[name], arms[reference]):
                rows.append((task, modality, name, reference, *[np.nan] * 8, why))
                continue
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
            reasons = filter(None, (scores.in_folds(mine), no_delong(y, n_classes), few))
            rows.append((task, modality, name, reference, *tested, *corrected, "; ".join(reasons)))
    columns = [*ARM, "reference", "difference", "low", "high", "z", "p_delong", "fold_difference", "t"]
    table = pd.DataFrame(rows, columns=[*columns, "p_corrected", "undefined"])
    for name in ("p_delong", "p_corrected"):
        p = table[name].dropna()
        adjusted = multipletests(p, method="holm")[1] if len(p) else []
        table.insert(len(table.columns) - 1, f"{name}_holm", pd.Series(adjusted, p.index, dtype=float))
    return table
