"""What the per-center explorer shows, as tables: an epoch by each rule, intervals, confusions, errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from ipmn_core.metrics import calibration, inference, scores
from ipmn_core.metrics.scores import ARM

RULES = {
    "best_test": "best on the test fold (paper)",
    "best_inner": "best on the inner split",
    "last": "last epoch or round",
}


def by_rules(predictions: pd.DataFrame, validation: pd.DataFrame | None = None) -> pd.DataFrame:
    """`metrics.select` by every rule, one under the other, with a column `rule`.

    Without `validation` (no inner split) there is no "best_inner".
    """
    inner = validation is not None and not validation.empty
    rules = [rule for rule in RULES if rule != "best_inner" or inner]
    return pd.concat(
        [scores.select(predictions, rule, validation).assign(rule=rule) for rule in rules], ignore_index=True
    )


def summary(selected: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Accuracy and AUC of every arm at each center and globally, with 95 % intervals: `inference.intervals`.

    `selected` as `by_rules` gives it. Columns task, modality, arm, rule, center, metric ("acc", "auc"), mean,
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
    return selected if center == scores.GLOBAL else selected[selected["center"] == center]


def as_high_risk(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one task as the question of high risk against the rest, whatever the classes were."""
    y, prob = calibration.high_risk(rows)
    return rows.assign(y_true=y.astype(int), prob_0=1 - prob, prob_1=prob, prob_2=np.nan, task="binary")


def confusion(rows: pd.DataFrame) -> np.ndarray:
    """Cases by true class (rows) and most probable class (columns), (K, K), of one arm's rows."""
    y, prob = scores.y_and_prob(rows)
    return confusion_matrix(y, prob.argmax(axis=1), labels=range(prob.shape[1]))


def most_wrong(rows: pd.DataFrame, n: int = 8) -> pd.DataFrame:
    """The `n` cases of one arm's rows whose true class was given the least probability, the worst first.

    Columns case_id, center, modality, y_true, predicted (class), probability (of the true class).
    """
    y, prob = scores.y_and_prob(rows)
    worst = rows[["case_id", "center", "modality", "y_true"]].assign(
        predicted=prob.argmax(axis=1), probability=prob[np.arange(len(y)), y]
    )
    return worst.sort_values("probability", kind="stable").head(n).reset_index(drop=True)
