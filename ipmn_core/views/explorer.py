"""The per-center explorer: a live view of results center by center, down to single cases."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from ipmn_core import metrics
from ipmn_core.data import Cohort
from ipmn_core.metrics import centers
from ipmn_core.names import display_name, is_personal
from ipmn_core.params import Preprocessing
from ipmn_core.views.live import LiveView, answering, viewer_state
from ipmn_core.views.results import forest
from ipmn_core.views.style import REFERENCES, centers_in, color, in_order

METRICS = [["auc", "AUC", "mean over folds"], ["acc", "accuracy", "all test cases"]]  # as in `intervals`


def center_explorer(
    predictions: pd.DataFrame,
    validation: pd.DataFrame | None,
    cohort: Cohort,
    how: Preprocessing,
    seed: int = 0,
) -> LiveView:
    """Results by center: intervals of all centers; ROC, confusions, scores and worst cases of one center.

    `predictions` of one or both tasks, every epoch; `validation`: those of the inner split, if any. A chosen
    case opens in a viewer of the cohort, or on a page in the page's viewer.
    """
    selected = centers.by_rules(predictions, validation)
    summary = centers.summary(selected, seed=seed)
    state = explorer_state(selected, summary, cohort)
    live = state | {"scans": viewer_state(cohort.scans, how)}
    first = state["views"][0]
    shown = summary[(summary["task"] == first["task"]) & (summary["modality"] == first["modality"])]
    shown = shown[(shown["rule"] == state["rules"][0][0]) & (shown["metric"] == "auc")]
    shown = shown.assign(value=shown["mean"], line=0.5)
    alt = "AUC by center, mean over folds with its 95 % interval, a color per arm"
    still = partial(forest, shown, "AUC, mean over folds, with 95 % interval")
    return LiveView("explorer", live, still, alt, lambda: state, answering(cohort.scans, how))


def explorer_state(selected: pd.DataFrame, summary: pd.DataFrame, cohort: Cohort) -> dict[str, Any]:
    """The state of the explorer, from the two tables of `centers`.

    `selected`: predictions, one epoch per run and rule (`centers.by_rules`); `summary`: intervals
    (`centers.summary`).
    """
    rules = [[rule, words] for rule, words in centers.RULES.items() if (selected["rule"] == rule).any()]
    views = [
        _results(rows, summary[(summary["task"] == task) & (summary["modality"] == modality)], cohort)
        for (task, modality), rows in selected.groupby(["task", "modality"])
    ]
    return {"rules": rules, "metrics": METRICS, "views": views, "scans": None}


def _results(rows: pd.DataFrame, summary: pd.DataFrame, cohort: Cohort) -> dict:
    """Data of one task and modality for the explorer; arms, centers and cases are indices into lists."""
    task, modality = rows[["task", "modality"]].iloc[0]
    arms, classes = in_order(rows["arm"]), cohort.names(task)
    cases = rows[["case_id", "center", "y_true"]].drop_duplicates(ignore_index=True)
    centers = centers_in([*cases["center"], *summary["center"], metrics.GLOBAL])
    return {
        "task": task,
        "taskName": f"{classes[1]} against the rest" if task == "binary" else ", ".join(classes),
        "modality": modality,
        "modalityName": display_name(modality),
        "classes": classes,
        "arms": [_arm(arm) for arm in arms],
        "centers": [display_name(center) for center in centers],
        "cases": {
            "id": cases["case_id"].astype(str).tolist(),
            "center": cases["center"].map(centers.index).tolist(),
            "y": cases["y_true"].astype(int).tolist(),
        },
        "scores": _scores(rows, arms, cases),
        "summary": _summary(summary, arms, centers),
    }


def _arm(name: str) -> dict:
    """Name, label and color of an arm, and whether it is a reference (dashed) or personal."""
    look = {"name": name, "label": display_name(name), "color": to_hex(color(name))}
    return look | {"reference": name in REFERENCES, "personal": is_personal(name)}


def _scores(rows: pd.DataFrame, arms: list[str], cases: pd.DataFrame) -> list[dict]:
    """Probabilities (N, K) of every arm and rule, in the networks' float32; rounding would create ties.

    NaN marks a case that was not tested. `epochs` are the chosen ones, by fold.
    """
    place = pd.Series(cases.index, cases["case_id"])
    scored = []
    for (arm, rule), part in rows.groupby(["arm", "rule"], sort=False):
        _, prob = metrics.y_and_prob(part)
        table = np.full((len(cases), prob.shape[1]), np.nan, "<f4")
        table[place[part["case_id"]]] = prob
        epochs = [epoch or "as given" for epoch in part.groupby("fold")["epoch"].first().tolist()]
        packed = base64.b64encode(table.tobytes()).decode()
        scored.append({"arm": arms.index(arm), "rule": rule, "epochs": epochs, "p": packed})
    return scored


def _summary(summary: pd.DataFrame, arms: list[str], centers: list[str]) -> list[list]:
    """Rows arm, rule, metric, center, mean, low, high (3 decimals, None where undefined), why."""
    numbers = ["mean", "low", "high"]
    table = summary[["arm", "rule", "metric", "center", *numbers, "undefined"]].astype(object)
    table[numbers] = summary[numbers].astype(float).round(3).astype(object)
    table["arm"], table["center"] = summary["arm"].map(arms.index), summary["center"].map(centers.index)
    return table.where(table.notna(), None).to_numpy(object).tolist()
