"""Figures of results: the forest, curves over epochs, ROC; scanners of the cohort."""

from __future__ import annotations

import textwrap
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.metrics import roc_curve

from ipmn_core import metrics
from ipmn_core.names import display_name, is_personal
from ipmn_core.views import style
from ipmn_core.views.style import MANY, REFERENCES, SMALL, WIDTH, centers_in, color, in_order

ACROSS = 5  # at most this many panels in a line, or curves in a panel, are readable


def panels(table: pd.DataFrame, column: str, row: str, height: float, **share):
    """Axes (rows, columns), and a list of (axes, rows of the table) of each panel with rows.

    One panel per value of `column` (across) and of `row` (down), each `height` inches high.
    """
    down, across = (in_order(table[name]) or [""] for name in (row, column))
    wide = min(len(across), ACROSS)
    lines = -(-len(across) // wide)
    size = WIDTH, height * lines * len(down) + 0.3 if len(table) else 0.6
    how = {"figsize": size, "squeeze": False, "layout": "constrained"}
    axes = plt.subplots(lines * len(down), wide, **how, **share)[1]
    across += [None] * (lines * wide - len(across))
    found = []
    for ax, (below, beside) in zip(axes.flat, product(down, across), strict=True):
        names = [display_name(name) for name in (below, beside) if name]
        ax.set_title(style.short(", ".join(names)) if lines > 1 else ", ".join(names))
        rows = table[(table[row] == below) & (table[column] == beside)]
        if len(rows):
            found.append((ax, rows))
        elif beside is None:
            ax.set_axis_off()
            ax.set_title("")
        else:
            ax.text(0.5, 0.5, "n/a: nothing to show in this profile", ha="center", transform=ax.transAxes)
            ax.set_axis_off()
    return axes, found


def labelled(axes: np.ndarray, xlabel: str, ylabel: str = "", title: str | None = None) -> Figure:
    """Label the outer axes, add a legend right of each row of panels with new names; return the figure."""
    last = []
    for row in axes:
        row[0].set_ylabel(ylabel)
        shown = {label: h for ax in row for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if list(shown) != last:
            place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": -(-len(shown) // MANY)}
            row[-1].legend(shown.values(), shown, title=title, **place)
        last = list(shown)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    return axes[0, 0].figure


def forest(
    table: pd.DataFrame,
    xlabel: str,
    ylabel: str = "center",
    column: str = "modality",
    row: str = "task",
    limits: tuple[float, float] | None = (-0.05, 1.05),
) -> Figure:
    """A value with its interval for each arm at each center: a panel per `column` (across) and `row` (down).

    Columns center, arm, value, `column` and `row`; optional: low and high (the interval), undefined (why a
    value is NaN), line (a gray line in the center's row, such as chance), and paper_value, paper_low,
    paper_high (hollow, below ours). References are square.
    """
    table = table.assign(**{name: table.get(name, np.nan) for name in ("low", "high")})
    table = table.assign(undefined=table.get("undefined", ""))
    sizes = table.groupby(row)[["arm", "center"]].nunique()
    height = 0.6 + min(14, ((0.13 * sizes["arm"] + 0.12) * sizes["center"]).max())
    axes, shown = panels(table, column, row, height, sharex=True, sharey="row")
    for ax, rows in shown:
        beside = table[table[row] == rows[row].iloc[0]]
        _draw_forest(ax, rows, centers_in(beside["center"]), list(beside["arm"].unique()))
        if limits:
            ax.set_xlim(limits)
    theirs = "paper_value" in table and table["paper_value"].notna().any()
    return labelled(axes, xlabel, ylabel, "filled: this run\nhollow: the paper" if theirs else None)


def _draw_forest(ax: Axes, rows: pd.DataFrame, names: list[str], arms: list[str]) -> None:
    slot = 0.84 / len(arms)  # a row is 1 high
    for arm, mine in rows.groupby("arm", sort=False):
        place, hue = mine["center"].map(names.index), color(arm)
        if "line" in mine:
            ax.vlines(mine["line"], place - 0.5, place + 0.5, color="0.6", linewidth=1, zorder=0.5)
        y = place + slot * (arms.index(arm) + 0.5) - 0.42
        marker = {"marker": "s" if arm in REFERENCES else "o", "label": display_name(arm)}
        sides = [("", y, marker)]
        if "paper_value" in mine:
            sides.append(("paper_", y + 0.36 * slot, {"marker": "D", "markerfacecolor": "white"}))
        for side, at, look in sides:
            ax.hlines(at, mine[f"{side}low"], mine[f"{side}high"], color=hue, linewidth=1)
            ax.plot(mine[f"{side}value"], at, linestyle="none", markersize=4, color=hue, **look)
        unknown = mine["value"].isna()
        for at, why in zip(y[unknown], mine.loc[unknown, "undefined"], strict=True):
            text = textwrap.shorten(f"n/a: {why}" if why else "n/a", 26, placeholder=" ...")
            look = {"color": hue, "fontsize": SMALL, "va": "center", "zorder": 4}
            ax.text(0.01, at, text, transform=ax.get_yaxis_transform(), **look)
    ax.set_yticks(range(len(names)), [style.short(display_name(name)) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    for k in range(0, len(names), 2):
        ax.axhspan(k - 0.5, k + 0.5, color="0.95", linewidth=0, zorder=-1)


def _over_folds(table: pd.DataFrame, suffix: str = "", side: str = "") -> dict[str, pd.Series]:
    """Columns value, low and high of a forest: mean ± standard deviation of the AUC."""
    mean, std = table[f"auc_mean{suffix}"], table[f"auc_std{suffix}"]
    return {f"{side}value": mean, f"{side}low": mean - std, f"{side}high": mean + std}


def forests(summary: pd.DataFrame) -> Figure:
    """AUC, mean ± standard deviation over folds, of the binary task by center and arm: a panel per modality.

    From `metrics.over_folds`.
    """
    table = summary[summary["task"] == "binary"]
    table = table.assign(**_over_folds(table), line=0.5)
    return forest(table, "AUC, mean ± standard deviation over folds")


def benchmark(table: pd.DataFrame) -> Figure:
    """Table 2 as a figure: AUC in percent of each model; the paper's values, if present, are hollow."""
    sides = _over_folds(table)
    if "auc_mean_paper" in table:
        sides |= _over_folds(table, "_paper", "paper_")
    table = table.rename(columns={"model": "center", "modality": "arm"})
    table = table.assign(**sides, task="multiclass", modality="")
    return forest(table, "AUC (%), mean ± standard deviation over folds", "network", limits=None)


def training_curves(
    histories: pd.DataFrame, column: str, ylabel: str, xlabel: str, reference: float | None = None
) -> Figure:
    """`column` of the histories by epoch: a panel per arm, a thin line per fold, a thick mean."""
    values = histories[column]
    axes, shown = panels(histories.assign(task=""), "arm", "task", 2.3, sharex="col", sharey=True)
    shades = {name: color(name) for name in in_order(histories["modality"])}
    for ax, rows in shown:
        for name in in_order(rows["modality"]):
            folds = rows[rows["modality"] == name].pivot_table(column, "epoch", "fold", dropna=False)
            look = {"color": shades[name], "marker": "." if len(folds) <= 10 else None}
            ax.plot(folds.index, folds, alpha=0.35, linewidth=0.8, markersize=3, **look)
            look["label"] = style.short(display_name(name))
            ax.plot(folds.index, folds.mean(axis=1), linewidth=2, markersize=8, **look)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)  # 1: for one epoch
        ax.set_xlim(rows["epoch"].min() - 0.5, rows["epoch"].max() + 0.5)
        if reference is not None:
            ax.axhline(reference, color="0.6", linewidth=0.8, linestyle=":")
    if values.min() > 0 and values.max() > max(1, 5 * values.min()):
        _by_factors(axes[0, 0])  # for a loss that starts high; an AUC is never above 1
    return labelled(axes, xlabel, ylabel, "thin: one fold\nthick: mean")


def _by_factors(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def scanners(facts: pd.DataFrame) -> Figure:
    """In-plane voxel size, slice thickness (mm) and ROI intensity (as stored) of each scan, by center."""
    shown = {
        "in_plane_mm": ("in-plane voxel size", "mm"),
        "slice_mm": ("slice thickness", "mm"),
        "roi_median": ("median intensity in the ROI", "as stored, no unit"),
    }
    rng, names = np.random.default_rng(0), centers_in(facts["center"])
    size = WIDTH, 2.6 if len(names) <= MANY else 3.6
    axes = plt.subplots(1, 3, figsize=size, squeeze=False, layout="constrained")[1]
    for ax, column in zip(axes[0], shown, strict=True):
        for m, (modality, rows) in enumerate(facts.groupby("modality")):
            x = rows["center"].map(names.index) + 0.3 * m - 0.15 + rng.uniform(-0.08, 0.08, len(rows))
            look = {"color": color(modality), "label": display_name(modality)}
            ax.scatter(x, rows[column], s=7, alpha=0.5, **look)
        style.name_ticks(ax.xaxis, names)
    _by_factors(axes[0, 2])
    figure = labelled(axes, "center", title="one point per scan")
    for ax, (title, unit) in zip(axes[0], shown.values(), strict=True):
        ax.set(title=title, ylabel=unit)
    return figure


def roc(selected: pd.DataFrame, ax: Axes, title: str) -> Axes:
    """ROC of each arm on cases of the binary task and one modality, with the test folds' scores pooled.

    The legend has the AUCs. Without cases of both classes, the panel says so.
    """
    for arm, part in selected.groupby("arm", sort=False):
        y, prob = metrics.y_and_prob(part)
        if len(np.unique(y)) == 2:
            false, true, _ = roc_curve(y, prob[:, 1])
            ax.plot(false, true, color=color(arm), linewidth=1.2, label=f"{metrics.auc(y, prob):.2f}")
    if ax.lines:
        ax.legend(title="AUC", loc="center left", bbox_to_anchor=(0.98, 0.5), handlelength=0.7)
    else:
        ax.text(0.5, 0.6, "n/a: one class only" if len(selected) else "n/a", ha="center")
    ax.plot((0, 1), (0, 1), color="0.8", linewidth=0.8, zorder=0)
    cases = selected.drop_duplicates("case_id")["y_true"]
    ax.set(title=f"{style.short(title)}\n{cases.sum()} of {len(cases)} positive", aspect="equal")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    return ax


def roc_by_center(selected: pd.DataFrame) -> Figure:
    """A ROC panel for all centers together and for each center, one modality of the binary task.

    Shows the largest centers and the first arms, if there are many. The AUCs are right of each panel, the
    arms' names below. The panel of all centers leaves out personal arms, whose models share no scale.
    """
    arms = list(selected["arm"].unique())[:ACROSS]
    selected = selected[selected["arm"].isin(arms)]
    largest = selected.drop_duplicates("case_id")["center"].value_counts()[: MANY - 1].index
    places = [metrics.GLOBAL, *(name for name in centers_in(selected["center"]) if name in largest)]
    down = -(-len(places) // 4)
    figure, axes = plt.subplots(down, 4, figsize=(WIDTH, 2.2 * down + 0.4), squeeze=False)
    pooled = selected[~selected["arm"].map(is_personal)]
    roc(pooled, axes[0, 0], display_name(metrics.GLOBAL))
    for ax, center in zip(axes.flat[1:], places[1:], strict=False):
        roc(selected[selected["center"] == center], ax, center)
        ax.set_ylabel("")
    for ax in axes.flat[len(places) :]:
        ax.set_axis_off()
    lines = [plt.Line2D([], [], color=color(arm), label=display_name(arm)) for arm in arms]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(arms))
    return figure
