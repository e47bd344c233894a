"""Does it know the disease or the center? The AUC taken apart into pairs within and between centers.

An AUC is the share of (positive, negative) pairs in the right order, ties one half. Knowing the centers'
prevalences alone orders pairs of two centers, but no pair of one center. Pairs are counted inside a fold, for
models of two folds share no scale, and summed over folds. Within- and between-cluster concordance: van
Klaveren et al., BMC Medical Research Methodology 14:5 (2014).
"""

from itertools import product

import numpy as np
import pandas as pd

from ipmn_core.metrics.scores import ARM, CLASSES, GLOBAL, one_epoch, y_and_prob
from ipmn_core.names import CENTERS

SUMS = ["wins", "pairs", "positives", "cases"]


def decompose(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC of every arm over all pairs, over those of one center and over those of two; one epoch a run.

    Columns task, modality, arm, pooled, within, between, share_within, pairs, undefined. `share_within` is
    the share of pairs within a center: pooled = share_within * within + (1 - share_within) * between.
    A fold counts by its pairs, so `pooled` differs slightly from the mean of the folds' AUCs. Binary: high
    risk against the rest. Three classes: the mean over classes of each class's value against the rest
    (`pairs`: their sum); the identity then holds for each class, not for the means. `local_only` has a model
    a center, whose scores share no scale: of it only `within` can be read. A value that has no pairs is NaN
    and `undefined` says why. Raises ValueError if a run has several epochs.
    """
    counts, keys = _counts(selected), [*ARM, "risk"]
    together = counts["center"] == GLOBAL
    every = counts[together].groupby(keys, sort=False)[SUMS].sum()
    inside = counts[~together].groupby(keys, sort=False)[SUMS].sum()
    across = every - inside
    table = pd.DataFrame(
        {
            "pooled": every["wins"] / every["pairs"],
            "within": inside["wins"] / inside["pairs"],
            "between": across["wins"] / across["pairs"],
            "share_within": inside["pairs"] / every["pairs"],
            "pairs": every["pairs"],
            "undefined": _reasons(every, inside, across),
        }
    )
    return _over_risks(table, ARM)


def within_by_center(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC of every arm over the pairs of each center, one epoch a run; centers in the order of `CENTERS`.

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
    for arm, frame in one_epoch(selected).groupby(ARM, sort=False):
        y, prob = y_and_prob(frame)
        center, fold = frame["center"].to_numpy(), frame["fold"].to_numpy()
        centers = [*sorted(set(center), key=CENTERS.index), GLOBAL]
        classes = [1] if prob.shape[1] == 2 else range(prob.shape[1])
        for c, f, k in product(centers, np.unique(fold), classes):
            mine = (fold == f) & ((center == c) | (c == GLOBAL))
            risk = CLASSES[prob.shape[1]][k]
            rows.append((*arm, c, f, risk, *_wins(y[mine] == k, prob[mine, k])))
    return pd.DataFrame(rows, columns=[*ARM, "center", "fold", "risk", *SUMS])


def _wins(positive: np.ndarray, score: np.ndarray) -> tuple[float, int, int, int]:
    """Pairs in the right order, ties half, of a score (N,); all pairs; positives; N. The AUC's definition."""
    pos, neg = score[positive][:, None], score[~positive]
    wins = np.sum(pos > neg) + np.sum(pos == neg) / 2
    return float(wins), pos.size * neg.size, pos.size, len(score)


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
