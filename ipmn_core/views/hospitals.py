"""Static figures of the per-center explorer: intervals of every center, and one center in detail."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipmn_core import metrics
from ipmn_core.metrics import centers
from ipmn_core.names import CENTERS, LABEL_NAMES, display_name
from ipmn_core.views import figures


def intervals(summary: pd.DataFrame, ax: Axes, center: str = "") -> Axes:
    """Means and 95 % intervals of one task, modality, rule and metric of `centers.summary`.

    A row a center, a colour an arm; `center` is shaded; what is undefined is written as n/a.
    """
    centers = [c for c in (*CENTERS, metrics.GLOBAL) if (summary["center"] == c).any()]
    arms = list(dict.fromkeys(summary["arm"]))
    shifts = np.linspace(-0.33, 0.33, len(arms)) if len(arms) > 1 else [0.0]
    for arm, shift in zip(arms, shifts, strict=True):
        rows = summary[summary["arm"] == arm].set_index("center").reindex(centers)
        color, y = figures.color(arm), np.arange(len(centers)) + shift
        ends = np.abs([rows["mean"] - rows["low"], rows["high"] - rows["mean"]])
        ax.errorbar(rows["mean"], y, xerr=ends, fmt="o", ms=4, lw=1.2, color=color, label=display_name(arm))
        for place in y[rows["mean"].isna()]:
            ax.text(0.5, place, "n/a", color=color, fontsize=figures.SMALL, va="center", ha="center")
    if center in centers:
        ax.axhspan(centers.index(center) - 0.5, centers.index(center) + 0.5, color="0.92", zorder=0)
    metric = summary["metric"].iloc[0].upper() if len(summary) else ""
    if metric == "AUC":  # an accuracy has no such line
        ax.axvline(0.5, color="0.8", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(centers)), [display_name(name) for name in centers])
    of = "all test cases" if metric == "ACC" else "mean over folds"  # as `inference.intervals` has them
    ax.set(xlim=(-0.03, 1.03), xlabel=f"{metric}, {of}, with 95 % interval")
    ax.set_ylim(len(centers) - 0.5, -0.5)
    return ax


def overview(summary: pd.DataFrame, center: str = "") -> Figure:
    """The figure of `intervals`, its legend above."""
    height = figures.row_height(summary["arm"].nunique()) * summary["center"].nunique() + 0.8
    figure, ax = plt.subplots(figsize=(figures.WIDTH, height))
    intervals(summary, ax, center)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=figures.SMALL
    )
    return figure


def confusion(rows: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Cases by true and most probable class of one arm."""
    matrix = centers.confusion(rows)
    names = [name.replace("not high", "not\nhigh") for name in LABEL_NAMES[len(matrix) == 2]]
    ax.imshow(matrix, cmap="Blues", vmin=0, vmax=max(matrix.max(), 1))
    for (i, j), n in np.ndenumerate(matrix):
        ax.text(j, i, n, ha="center", va="center", color="white" if n > matrix.max() / 2 else "black")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names, rotation=90, va="center")
    ax.tick_params(length=0)
    ax.set(title=title, xlabel="most probable class", ylabel="true class")
    return ax


def center_in_detail(rows: pd.DataFrame, center: str, arm: str) -> Figure:
    """ROC of every arm for high risk, confusion matrix and scores of one `arm`, at one center or globally.

    `rows` hold one task and modality, one epoch a run.
    """
    here = centers.at(rows, center)
    height = 3.4 + 0.2 * -(-max(here["arm"].nunique(), 1) // 5)  # a line of the legend holds five arms
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(figures.WIDTH, height))
    name = display_name(center)
    high = centers.as_high_risk(here) if len(here) else here
    if center == metrics.GLOBAL:
        figures.roc_together(high, left)
    else:
        figures.roc(high, left, name)
    _aucs_below(left)
    mine = here[here["arm"] == arm]
    if mine.empty:
        why = f"{display_name(arm)} is not among the arms shown" if len(here) else "no cases"
        for ax in (middle, right):
            ax.set_axis_off()
            ax.set_title(f"{name}: {why}")
        return figure
    confusion(mine, middle, f"{name}: {display_name(arm)}")
    figures.score_histogram(high[high["arm"] == arm], right, f"{name}: {display_name(arm)}")
    for ax in (middle, right):
        ax.set_box_aspect(1)
    return figure


def _aucs_below(ax: Axes) -> None:
    """The legend of a ROC panel, methods and AUCs, below all panels: beside it, it would narrow the panel."""
    lines, labels = ax.get_legend_handles_labels()
    if lines:
        ax.get_legend().remove()
        place = {"loc": "outside lower center", "ncols": min(len(lines), 5), "fontsize": figures.SMALL}
        ax.figure.legend(lines, labels, title="AUC", **place)
