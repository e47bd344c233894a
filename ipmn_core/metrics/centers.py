"""The AUC within and between centers, and the tables of the per-center explorer.

An AUC is the share of (positive, negative) pairs in the right order, ties one half. Knowing the centers'
prevalences alone orders pairs of two centers, but no pair of one center. Pairs are counted inside a fold,
because models of two folds share no scale, and summed over folds. Within- and between-cluster concordance:
van Klaveren et al., BMC Medical Research Methodology 14:5 (2014).
"""

from itertools import product

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from ipmn_core.metrics import calibration, inference, scores
from ipmn_core.metrics.scores import ARM, GLOBAL, PLACES, RULES, y_and_prob

SUMS = ["wins", "pairs", "positives", "cases"]


def decompose(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC of every arm over all pairs, over those of one center and over those of two; one epoch per run.

    Columns task, modality, arm, pooled, within, between, share_within, pairs, undefined. `share_within` is
    the share of pairs within a center: pooled = share_within * within + (1 - share_within) * between.
    A fold counts by its pairs, so `pooled` differs slightly from the mean of the folds' AUCs. Binary: high
    risk against the rest. Three classes: the mean over classes of each class's value against the rest
    (`pairs`: their sum); the identity then holds for each class, not for the means. `local_only` has one
    model per center, whose scores share no scale: only its `within` has a meaning. A value that has no pairs
    is NaN and `undefined` says why. Raises ValueError if a run has several epochs.
    """
    counts, keys = _counts(selected), [*ARM, "risk"]
    together = counts["center"] == GLOBAL
    every = counts[together].groupby(keys, sort=False)[SUMS].sum()
    inside = counts[~together].groupby(keys, sort=False)[SUMS].sum()
    across = every - inside
    columns = {
        "pooled": every["wins"] / every["pairs"],
        "within": inside["wins"] / inside["pairs"],
        "between": across["wins"] / across["pairs"],
        "share_within": inside["pairs"] / every["pairs"],
        "pairs": every["pairs"],
        "undefined": _reasons(every, inside, across),
    }
    return _over_risks(pd.DataFrame(columns), ARM)


def within_by_center(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC of every arm over the pairs of each center, one epoch per run; centers in the order of `CENTERS`.

    Columns task, modality, arm, center, within, pairs, positives, undefined: pairs of one fold, summed over
    folds; `positives` are the high-risk cases. Three classes and undefined values as in `decompose`.
    Raises ValueError if a run has several epochs.
    """
    counts, keys = _counts(selected), [*ARM, "center"]
    sums = counts[counts["center"] != GLOBAL].groupby([*keys, "risk"], sort=False)[SUMS].sum()
    table = sums[["pairs", "positives"]].assign(undefined=_reasons(sums, sums, sums))
    table.insert(0, "within", sums["wins"] / sums["pairs"])
    return _over_risks(table, keys)


def _counts(selected: pd.DataFrame) -> pd.DataFrame:
    """The pairs of each arm, center (and all together), fold and class, and how many are in the right order.

    Columns task, modality, arm, center, fold, risk, wins, pairs, positives, cases.
    """
    rows = []
    for arm, frame in scores.one_epoch(selected).groupby(ARM, sort=False):
        y, prob = y_and_prob(frame)
        center, fold = frame["center"].to_numpy(), frame["fold"].to_numpy()
        centers = sorted({*center, GLOBAL}, key=PLACES.index)
        for c, f, k in product(centers, np.unique(fold), scores.scored_classes(prob)):
            mine = (fold == f) & ((center == c) | (c == GLOBAL))
            below, above = scores.wins(y[mine] == k, prob[mine, k])
            sums = below.sum(), len(below) * len(above), len(below), len(below) + len(above)
            rows.append((*arm, c, f, scores.kinds(prob.shape[1])[k], *sums))
    return pd.DataFrame(rows, columns=[*ARM, "center", "fold", "risk", *SUMS])


def _reasons(every: pd.DataFrame, inside: pd.DataFrame, across: pd.DataFrame) -> np.ndarray:
    """Why a value of each row is undefined, "" where none is; the last reason that holds is the plainest."""
    reasons = np.full(len(every), "")
    for holds, reason in [
        (inside["pairs"] == 0, "no center has both {} and other cases in one fold"),
        (across["pairs"] == 0, "all pairs of {} and other cases are of one center"),
        (every["pairs"] == 0, "no fold has both {} and other cases"),
        (every["positives"] == 0, "no {} case"),
        (every["positives"] == every["cases"], "only {} cases"),
    ]:
        named = [reason.format(risk) for risk in every.index.get_level_values("risk")]
        reasons = np.where(holds, named, reasons)
    return reasons


def _over_risks(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Rows of one class -> one row for all: means, NaN if one is NaN; pairs summed; reasons listed."""
    how = dict.fromkeys(table, lambda values: values.mean(skipna=False))
    how |= {
        "pairs": "sum",
        "positives": "last",
        "undefined": lambda reasons: "; ".join(filter(None, reasons)),
    }
    return table.groupby(keys, sort=False).agg({name: how[name] for name in table}).reset_index()


def by_rules(predictions: pd.DataFrame, validation: pd.DataFrame | None = None) -> pd.DataFrame:
    """`metrics.select` by every rule, one below the other, with a column `rule`.

    Without `validation` (no inner split) there is no "best_inner".
    """
    inner = validation is not None and not validation.empty
    rules = [rule for rule in RULES if rule != "best_inner" or inner]
    return pd.concat(
        [scores.select(predictions, rule, validation).assign(rule=rule) for rule in rules], ignore_index=True
    )


def summary(selected: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Accuracy and AUC of every arm at each center and globally, with 95 % intervals: `inference.intervals`.

    `selected` is that of `by_rules`. Columns task, modality, arm, rule, center, metric ("acc", "auc"), mean,
    low, high, undefined.
    """
    tables = []
    for (rule, _), rows in selected.groupby(["rule", "task"], sort=False):
        numbers = inference.intervals(rows.drop(columns="rule"), n_resamples, seed).assign(rule=rule)
        for metric in ("acc", "auc"):
            names = {metric: "mean", f"{metric}_low": "low", f"{metric}_high": "high"}
            tables.append(numbers.rename(columns=names).assign(metric=metric))
    columns = [*ARM, "rule", "center", "metric", "mean", "low", "high", "undefined"]
    return pd.concat(tables, ignore_index=True)[columns]


def at(selected: pd.DataFrame, center: str) -> pd.DataFrame:
    """The rows of one center, or all for "global"."""
    return selected if center == GLOBAL else selected[selected["center"] == center]


def as_high_risk(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one task as the question of high risk against the rest, for two or three classes."""
    y, prob = calibration.high_risk(rows)
    return rows.assign(y_true=y.astype(int), prob_0=1 - prob, prob_1=prob, prob_2=np.nan, task="binary")


def confusion(rows: pd.DataFrame) -> np.ndarray:
    """Cases by true class (rows) and most probable class (columns), (K, K), of one arm's rows."""
    y, prob = y_and_prob(rows)
    return confusion_matrix(y, prob.argmax(axis=1), labels=range(prob.shape[1]))


def most_wrong(rows: pd.DataFrame, n: int = 8) -> pd.DataFrame:
    """The `n` cases of one arm's rows with the lowest probability of the true class, the lowest first.

    Columns case_id, center, modality, y_true, predicted (class), probability (of the true class).
    """
    y, prob = y_and_prob(rows)
    worst = rows[["case_id", "center", "modality", "y_true"]].assign(
        predicted=prob.argmax(axis=1), probability=prob[np.arange(len(y)), y]
    )
    return worst.sort_values("probability", kind="stable").head(n).reset_index(drop=True)
