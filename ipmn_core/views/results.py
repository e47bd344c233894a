"""Figures of results: curves over epochs, forests, ROC, scores, confusions; scanners of the cohort."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.metrics import roc_curve

from ipmn_core import metrics
from ipmn_core.metrics import centers
from ipmn_core.names import class_names, display_name
from ipmn_core.views.style import (
    PALETTE,
    REFERENCES,
    SMALL,
    WIDTH,
    centers_in,
    color,
    legend_beside,
    named_rows,
    row_height,
)

TASKS = {"binary": "High risk", "three_class": "Three classes"}
SLOTS = 0.84  # of a row's height, shared by its arms
OURS_AND_PAPER = "filled: this run\nhollow: the paper"


def scanners(facts: pd.DataFrame) -> Figure:
    """In-plane voxel size, slice thickness (mm) and ROI intensity (as stored) of each scan, by center."""
    panels = {
        "in_plane_mm": ("in-plane voxel size", "mm"),
        "slice_mm": ("slice thickness", "mm"),
        "roi_median": ("median intensity in the ROI", "as stored, no unit"),
    }
    rng, centers = np.random.default_rng(0), centers_in(facts["center"])
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6))
    for ax, (column, (title, unit)) in zip(axes, panels.items(), strict=True):
        for m, (modality, rows) in enumerate(facts.groupby("modality")):
            x = rows["center"].map(centers.index) + 0.3 * m - 0.15 + rng.uniform(-0.08, 0.08, len(rows))
            look = {"color": color(modality), "label": display_name(modality)}
            ax.scatter(x, rows[column], s=7, alpha=0.5, **look)
        ax.set_xticks(range(len(centers)), centers, fontsize=SMALL)
        ax.set(title=title, xlabel="center", ylabel=unit)
    axes[2].set_yscale("log")
    legend_beside(axes[2], "one point per scan", markerscale=2)
    return figure


def training_curves(
    histories: pd.DataFrame, column: str, ylabel: str, xlabel: str, reference: float | None = None
) -> Figure:
    """`column` of the histories by epoch: a panel per arm, a thin line per fold, a thick one their mean."""
    arms = list(dict.fromkeys(histories["arm"]))
    size = min(WIDTH, 1 + 2 * len(arms)), 2.3
    figure, axes = plt.subplots(1, len(arms), figsize=size, sharey=True, squeeze=False)
    for ax, arm in zip(axes[0], arms, strict=True):
        mine = histories[histories["arm"] == arm]
        for modality, rows in mine.groupby("modality"):
            folds = rows.pivot(index="epoch", columns="fold", values=column)
            look = {"color": color(modality), "marker": "."}
            ax.plot(folds.index, folds, alpha=0.35, linewidth=0.8, markersize=3, **look)
            name = display_name(modality)
            ax.plot(folds.index, folds.mean(axis=1), linewidth=2, markersize=8, label=name, **look)
        if reference is not None:
            ax.axhline(reference, color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=display_name(arm), xlabel=xlabel)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)  # also of one epoch
        ax.set_xlim(mine["epoch"].min() - 0.5, mine["epoch"].max() + 0.5)
    axes[0, 0].set_ylabel(ylabel)
    if histories[column].max() > max(1, 5 * histories[column].min()) and histories[column].min() > 0:
        axes[0, 0].set_yscale("log")  # a loss that one arm begins high; an AUC is never above 1
        axes[0, 0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
    legend_beside(axes[0, -1], "thin: a fold\nthick: mean")
    return figure


def panels(table: pd.DataFrame, column: str, row: str, height: float, **share):
    """Axes (rows, columns), and the axes and rows of the table of each panel that has any.

    One panel per value of `column` (across) and of `row` (down, if the table has it), `height` inches each.
    """
    table = table.assign(**{row: table.get(row, "")})
    down, across = distinct(table[row]), distinct(table[column])
    size = min(WIDTH, 1.5 + 4 * len(across)), height * len(down) + 0.3
    axes = plt.subplots(len(down), len(across), figsize=size, squeeze=False, layout="constrained", **share)[1]
    groups, found = dict(list(table.groupby([row, column]))), []
    for (i, j), ax in np.ndenumerate(axes):
        key = down[i], across[j]
        ax.set_title(", ".join(TASKS.get(name, display_name(name)) for name in key if name))
        if key in groups:
            found.append((ax, groups[key]))
        else:
            ax.set_title(f"{ax.get_title()}: no runs")
            ax.set_axis_off()
    return axes, found


def distinct(names: pd.Series) -> list[str]:
    """Distinct values: tasks and modalities sorted, arms in order of appearance."""
    values = list(dict.fromkeys(names))
    return sorted(values) if names.name in ("task", "modality") else values


def labelled(axes: np.ndarray, xlabel: str, ylabel: str = "", title: str | None = None) -> Figure:
    """The figure, its outer axes labelled, with a legend right of each row of panels that shows new names."""
    last = []
    for row in axes:
        row[0].set_ylabel(ylabel)
        shown = {label: h for ax in row for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if list(shown) != last:
            place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            row[-1].legend(shown.values(), shown, title=title, fontsize=SMALL, title_fontsize=SMALL, **place)
        last = list(shown)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    return axes[0, 0].figure


def shifts(arms: list[str]) -> dict[str, float]:
    """Height of each arm within a row, which is 1 high."""
    return {arm: SLOTS * ((k + 0.5) / len(arms) - 0.5) for k, arm in enumerate(arms)}


def forest(
    table: pd.DataFrame,
    ax: Axes,
    columns: tuple[str, str, str] = ("mean", "low", "high"),
    paper: pd.DataFrame | None = None,
    line: float | None = None,
    row: str = "center",
    arm: str = "arm",
) -> Axes:
    """A value with its interval (`columns`: value, low, high) for every arm at every center.

    One row per `row`, one color per `arm`; references are square. An undefined value is written as n/a, with
    its reason if the table has a column `undefined`. `paper` has the same columns, drawn hollow below ours,
    those of unknown arms or rows left out. `line` is a vertical line, such as chance.
    """
    rows = centers_in(table[row])
    heights = shifts(list(dict.fromkeys(table[arm])))
    for name, shift in heights.items():
        mine, hue = table[table[arm] == name], color(name)
        marker = {"marker": "s" if name in REFERENCES else "o", "label": display_name(name)}
        y, value = _with_intervals(ax, mine, columns, rows, row, shift, **marker, color=hue)
        for k in np.flatnonzero(np.isnan(value)):
            reason = mine["undefined"].iloc[k] if "undefined" in mine else ""
            text = textwrap.shorten(f"n/a: {reason}" if reason else "n/a", 26, placeholder=" ...")
            look = {"color": hue, "fontsize": SMALL, "va": "center", "zorder": 4}
            ax.text(0.01, y[k], text, transform=ax.get_yaxis_transform(), **look)
        if paper is not None:
            theirs, below = paper[(paper[arm] == name) & paper[row].isin(rows)], 0.36 * SLOTS / len(heights)
            look = {"marker": "D", "color": hue, "markerfacecolor": "white"}
            _with_intervals(ax, theirs, columns, rows, row, shift + below, **look)
    if line is not None:
        ax.axvline(line, color="0.7", linewidth=0.9, zorder=0.5)
    named_rows(ax, rows)
    return ax


def _with_intervals(ax, table, columns, rows, row, shift, **look) -> tuple[np.ndarray, np.ndarray]:
    """Draw a marker and a bar for each row of a table; return their heights and values."""
    y = table[row].map(rows.index).to_numpy(float) + shift
    value, low, high = (table[name].to_numpy(float) for name in columns)
    ax.hlines(y, low, high, color=look["color"], linewidth=1)
    ax.plot(value, y, linestyle="none", markersize=4, **look)
    return y, value


def _over_folds(table: pd.DataFrame, metric: str, suffix: str = "") -> pd.DataFrame:
    """The table with mean, low and high: mean ± standard deviation of a metric."""
    mean, std = table[f"{metric}_mean{suffix}"], table[f"{metric}_std{suffix}"]
    return table.assign(mean=mean, low=mean - std, high=mean + std)


def forests(summary: pd.DataFrame, metric: str = "auc", paper: pd.DataFrame | None = None) -> Figure:
    """Mean ± standard deviation over folds of the binary task, centers by arms, a panel per modality.

    From `metrics.over_folds`; `paper`, its table 3, is drawn hollow.
    """
    binary = _over_folds(summary[summary["task"] == "binary"], metric)
    if paper is not None:
        paper = _over_folds(paper.rename(columns={"method": "arm"}), metric)
        binary = binary.assign(undefined="")  # a reason would cover the paper's values
    height = row_height(binary["arm"].nunique()) * binary["center"].nunique() + 0.5
    axes, shown = panels(binary, "modality", "task", height, sharex=True, sharey=True)
    for ax, rows in shown:
        theirs = None if paper is None else paper[paper["modality"] == rows["modality"].iloc[0]]
        forest(
            rows, ax, paper=theirs, line=0.5 if metric == "auc" else None
        )  # an accuracy has no chance line
        ax.set_xlim(-0.05, 1.05)
    xlabel = f"{metric.upper()}, mean ± standard deviation over folds"
    return labelled(axes, xlabel, "center", OURS_AND_PAPER if paper is not None else None)


def against_paper(table: pd.DataFrame, metric: str = "auc") -> Figure:
    """Table 2 as a picture: a metric in percent for each model, ours filled, the paper's hollow."""
    figure, ax = plt.subplots(figsize=(WIDTH, 0.5 * table["model"].nunique() + 0.7))
    ours, theirs = (_over_folds(table, metric, suffix) for suffix in ("", "_paper"))
    forest(ours, ax, paper=theirs, row="model", arm="modality")
    ax.set(xlabel=f"{metric.upper()} (%), mean ± standard deviation over folds", ylabel="network")
    legend_beside(ax, OURS_AND_PAPER)
    return figure


def overview(summary: pd.DataFrame, center: str = "") -> Figure:
    """Means and 95 % intervals of all arms at all centers, `center` shaded.

    `summary` holds one task, modality, rule and metric of `centers.summary`.
    """
    height = row_height(summary["arm"].nunique()) * summary["center"].nunique() + 0.8
    figure, ax = plt.subplots(figsize=(WIDTH, height))
    metric = summary["metric"].iloc[0].upper()
    forest(summary, ax, line=0.5 if metric == "AUC" else None)
    centers = centers_in(summary["center"])
    if center in centers:
        ax.axhspan(centers.index(center) - 0.5, centers.index(center) + 0.5, color="0.86", zorder=0)
    of = "all test cases" if metric == "ACC" else "mean over folds"  # as `inference.intervals` has them
    ax.set(xlim=(-0.03, 1.03), xlabel=f"{metric}, {of}, with 95 % interval")
    lines = ax.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=5, fontsize=SMALL)
    return figure


def roc(selected: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """ROC curves of the binary task, a color per arm, the test folds' scores pooled.

    Cases of one class have no curve, and the panel says so.
    """
    if selected.empty:
        return _empty(ax, f"{title}: no cases")
    for arm, part in selected.groupby("arm", sort=False):
        y, prob = metrics.y_and_prob(part)
        if len(np.unique(y)) < 2:
            ax.text(0.5, 0.6, "n/a: one class only", ha="center")
            break
        false, true, _ = roc_curve(y, prob[:, 1])
        label = f"{display_name(arm)} {metrics.auc(y, prob):.2f}"
        ax.plot(false, true, color=color(arm), linewidth=1.2, label=label)
    ax.plot((0, 1), (0, 1), color="0.8", linewidth=0.8, zorder=0)
    cases = selected[selected["arm"] == selected["arm"].iloc[0]]["y_true"]
    ax.set(title=f"{title} ({int(cases.sum())} of {len(cases)} high risk)", aspect="equal")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    if ax.get_legend_handles_labels()[0]:
        legend_beside(ax, "AUC", handlelength=1)
    return ax


def _empty(ax: Axes, title: str) -> Axes:
    ax.set_axis_off()
    ax.set_title(title)
    return ax


def _roc_together(selected: pd.DataFrame, ax: Axes) -> Axes:
    """The ROC of all centers together, without `local_only`: its models' scores share no scale to pool."""
    name = display_name(metrics.GLOBAL)
    roc(selected[selected["arm"] != "local_only"], ax, name)
    if len(selected) and not ax.lines:
        ax.set_title(f"{name}: scores of no common scale")
    return ax


def roc_by_center(selected: pd.DataFrame) -> Figure:
    """A ROC panel for all centers together and for each center, one modality of the binary task.

    The AUCs are right of each panel, the arms' names once below.
    """
    centers, columns = centers_in(selected["center"]), 4
    down = -(-(len(centers) + 1) // columns)
    figure, axes = plt.subplots(down, columns, figsize=(WIDTH, 2.1 * down + 0.4), squeeze=False)
    shown = [_roc_together(selected, axes.flat[0])]
    for ax, center in zip(axes.flat[1:], centers, strict=False):
        shown.append(roc(selected[selected["center"] == center], ax, center))
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    names = {}
    for ax in shown:
        lines, labels = ax.get_legend_handles_labels()
        named = [label.rsplit(" ", 1) for label in labels]  # name, AUC
        names |= {name: line for line, (name, _) in zip(lines, named, strict=True)}
        if lines:
            look = {"loc": "center left", "bbox_to_anchor": (0.98, 0.5), "handlelength": 0.7}
            ax.legend(lines, [auc for _, auc in named], title="AUC", handletextpad=0.4, **look)
    if names:
        figure.legend(names.values(), names, loc="outside lower center", ncols=len(names))
    return figure


def score_histogram(selected: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Predicted probability of high risk of one arm, cases of high risk against the rest."""
    y, prob = metrics.y_and_prob(selected)
    bins, hues = np.linspace(0, 1, 21), (PALETTE[6], PALETTE[4])
    ax.hist([prob[y == 0, 1], prob[y == 1, 1]], bins, label=["rest", "high risk"], color=hues)
    ax.set(title=title, xlabel="predicted probability of high risk", ylabel="cases")
    ax.locator_params(axis="y", integer=True)
    ax.legend()
    return ax


def confusion(rows: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Cases of one arm by true and most probable class."""
    matrix = centers.confusion(rows)
    names = [name.replace("not high", "not\nhigh") for name in class_names(rows["task"].iloc[0])]
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

    `rows` are of one task and modality, one epoch per run.
    """
    here, name = centers.at(rows, center), display_name(center)
    height = 3.4 + 0.2 * -(-max(here["arm"].nunique(), 1) // 5)  # a line of the legend holds five arms
    figure, (left, *others) = plt.subplots(1, 3, figsize=(WIDTH, height))
    high = centers.as_high_risk(here) if len(here) else here
    _roc_together(high, left) if center == metrics.GLOBAL else roc(high, left, name)
    lines, labels = left.get_legend_handles_labels()
    if lines:  # the AUCs below all panels: beside this one, they would narrow it
        left.get_legend().remove()
        place = {"loc": "outside lower center", "ncols": min(len(lines), 5), "fontsize": SMALL}
        figure.legend(lines, labels, title="AUC", **place)
    mine, title = here[here["arm"] == arm], f"{name}: {display_name(arm)}"
    if mine.empty:
        why = f"{title} is not among the arms shown" if len(here) else f"{name}: no cases"
        for ax in others:
            _empty(ax, why)
        return figure
    confusion(mine, others[0], title)
    score_histogram(high[high["arm"] == arm], others[1], title)
    for ax in others:
        ax.set_box_aspect(1)
    return figure
