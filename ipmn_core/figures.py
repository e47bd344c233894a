"""Static figures: each draws on the axes it is given, or lays out a figure of its own, and returns it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from ipmn_core import disk, metrics
from ipmn_core.cohort import CENTERS
from ipmn_core.tables import display_name

# Okabe and Ito's palette: told apart with any common colour vision
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6F6F6F")
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def use_style() -> None:
    """Sets one font size, palette and layout for every figure that follows."""
    plt.rcParams.update(STYLE)
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=PALETTE)


def save(figure: Figure, stem: str, folder: str | Path) -> Figure:
    """The figure, after writing it as `<stem>.png` into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write = lambda tmp: figure.savefig(tmp, format="png")  # noqa: E731
    disk.write(Path(folder) / f"{stem}.png", write)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG; it is closed."""
    with BytesIO() as buffer:
        figure.savefig(buffer, format="png")
        plt.close(figure)
        return buffer.getvalue()


def scanners(facts: pd.DataFrame) -> Figure:
    """In-plane voxel size, slice thickness (mm) and ROI intensity (as stored) of each scan, by center."""
    panels = {"in_plane_mm": "in-plane voxel size (mm)", "slice_mm": "slice thickness (mm)"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
    for ax, (column, title) in zip(
        axes, {**panels, "roi_median": "median ROI intensity (as stored)"}.items(), strict=True
    ):
        _strip(ax, facts, column)
        ax.set_title(title)
    axes[2].set_yscale("log")
    return figure


def _strip(ax: Axes, facts: pd.DataFrame, column: str) -> None:
    rng = np.random.default_rng(0)
    centers = [c for c in CENTERS if (facts["center"] == c).any()]
    for m, (modality, rows) in enumerate(facts.groupby("modality")):
        x = rows["center"].map(centers.index) + 0.3 * m - 0.15 + rng.uniform(-0.08, 0.08, len(rows))
        ax.scatter(x, rows[column], s=7, alpha=0.5, color=PALETTE[m], label=modality.upper())
    ax.set_xticks(range(len(centers)), centers)
    ax.legend(loc="best", markerscale=2)


def training_curves(
    histories: pd.DataFrame, column: str, ylabel: str, xlabel: str, reference: float | None = None
) -> Figure:
    """`column` of the histories over epochs: a panel an arm, a thin line a fold, a thick one their mean."""
    arms = list(dict.fromkeys(histories["arm"]))
    figure, axes = plt.subplots(1, len(arms), figsize=(2.1 * len(arms), 2.2), sharey=True, squeeze=False)
    for ax, arm in zip(axes[0], arms, strict=True):
        for m, (modality, rows) in enumerate(histories[histories["arm"] == arm].groupby("modality")):
            folds = rows.pivot(index="epoch", columns="fold", values=column)
            ax.plot(folds.index, folds, color=PALETTE[m], alpha=0.3, linewidth=0.8)
            ax.plot(
                folds.index,
                folds.mean(axis=1),
                color=PALETTE[m],
                linewidth=2,
                marker=".",
                label=modality.upper(),
            )
        if reference is not None:
            ax.axhline(reference, color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=display_name(arm), xlabel=xlabel)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].legend()
    return figure


def forest(summary: pd.DataFrame, ax: Axes, metric: str = "auc", paper: pd.DataFrame | None = None) -> Axes:
    """Mean +/- standard deviation over folds of a metric: a row a center, a colour a method.

    `summary` holds one task and modality of `metrics.over_folds`; `paper` the same rows of the paper's
    table 3, drawn hollow. An undefined value is written as n/a.
    """
    centers = [c for c in (*CENTERS, metrics.GLOBAL) if (summary["center"] == c).any()]
    arms = list(dict.fromkeys(summary["arm"]))
    for a, arm in enumerate(arms):
        shift = 0.7 * (a / max(len(arms) - 1, 1) - 0.5)
        ours = summary[summary["arm"] == arm].set_index("center")
        _markers(ax, ours, centers, shift, metric, PALETTE[a], "o", display_name(arm))
        if paper is not None:
            theirs = paper[paper["method"] == arm].set_index("center")
            _markers(ax, theirs, centers, shift + 0.08, metric, PALETTE[a], "D", None)
    ax.axvline(0.5, color="0.8", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(centers)), centers)
    ax.set(xlabel=f"{metric.upper()}, mean ± standard deviation over folds", xlim=(-0.05, 1.05))
    ax.set_ylim(len(centers) - 0.5, -0.5)
    return ax


def forests(summary: pd.DataFrame, metric: str = "auc", paper: pd.DataFrame | None = None) -> Figure:
    """The binary task's forest plots, a panel a modality; `paper` (its table 3) is drawn hollow beside."""
    rows = summary[summary["task"] == "binary"]
    modalities = sorted(rows["modality"].unique())
    figure, axes = plt.subplots(
        1, len(modalities), figsize=(4.6 * len(modalities), 4.2), sharey=True, squeeze=False
    )
    for ax, modality in zip(axes[0], modalities, strict=True):
        theirs = None if paper is None else paper[paper["modality"] == modality]
        forest(rows[rows["modality"] == modality], ax, metric, theirs).set_title(display_name(modality))
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _markers(ax, rows, centers, shift, metric, color, marker, label) -> None:
    rows = rows.reindex([c for c in centers if c in rows.index])
    y = np.array([centers.index(c) for c in rows.index]) + shift
    mean, std = rows[f"{metric}_mean"].to_numpy(float), rows[f"{metric}_std"].to_numpy(float)
    face = color if label else "white"
    ax.errorbar(mean, y, xerr=std, fmt=marker, ms=3.5, color=color, mfc=face, lw=0.9, label=label)
    for row in y[np.isnan(mean)]:
        ax.text(0.5, row, "n/a", color=color, fontsize=7, va="center")


def roc(selected: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """ROC curves of the binary task, a colour a method, the test folds' scores pooled.

    Where the cases are all of one class there is no curve, and the panel says so.
    """
    if selected.empty:
        return _empty(ax, title)
    for a, (arm, rows) in enumerate(selected.groupby("arm", sort=False)):
        y, prob = metrics.scores(rows)
        if len(np.unique(y)) < 2:
            ax.text(0.5, 0.5, "n/a: one class only", ha="center", fontsize=8)
            break
        false, true, _ = roc_curve(y, prob[:, 1])
        ax.plot(
            false,
            true,
            color=PALETTE[a],
            linewidth=1.2,
            label=f"{display_name(arm)} {metrics.auc(y, prob):.2f}",
        )
    ax.plot((0, 1), (0, 1), color="0.8", linewidth=0.8, zorder=0)
    cases = selected[selected["arm"] == selected["arm"].iloc[0]]["y_true"]
    ax.set(title=f"{title} ({int(cases.sum())} of {len(cases)} high risk)", aspect="equal")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=6, loc="lower right", handlelength=1)
    return ax


def _empty(ax: Axes, title: str) -> Axes:
    ax.set_axis_off()
    ax.set_title(f"{title}: no cases")
    return ax


def roc_by_center(selected: pd.DataFrame) -> Figure:
    """A ROC panel for all centers together and for each center, one modality of the binary task."""
    centers = [c for c in CENTERS if (selected["center"] == c).any()]
    columns = 4
    rows = -(-(len(centers) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.5 * rows), squeeze=False)
    roc(selected, axes.flat[0], "global")
    for ax, center in zip(axes.flat[1:], centers, strict=False):
        roc(selected[selected["center"] == center], ax, center)
    for ax in axes.flat[len(centers) + 1 :]:
        ax.set_axis_off()
    return figure


def score_histogram(selected: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Predicted probability of high risk of one method, cases of high risk against the rest."""
    if selected.empty:
        return _empty(ax, title)
    y, prob = metrics.scores(selected)
    bins = np.linspace(0, 1, 21)
    ax.hist([prob[y == 0, 1], prob[y == 1, 1]], bins, label=["rest", "high risk"], color=PALETTE[:2])
    ax.set(title=title, xlabel="predicted probability of high risk", ylabel="cases")
    ax.legend()
    return ax


def against_paper(table: pd.DataFrame, metric: str = "auc") -> Figure:
    """Table 2 as a picture: a metric in percent for each model, ours filled, the paper's hollow."""
    models = list(dict.fromkeys(table["model"]))
    figure, ax = plt.subplots(figsize=(6.5, 0.45 * len(models) + 0.8))
    for m, (modality, rows) in enumerate(table.groupby("modality")):
        y = rows["model"].map(models.index) + 0.3 * m - 0.15
        for suffix, face, marker, shift in (("", PALETTE[m], "o", 0), ("_paper", "white", "D", 0.12)):
            mean, std = rows[f"{metric}_mean{suffix}"], rows[f"{metric}_std{suffix}"]
            label = f"{modality.upper()}, {'paper' if suffix else 'this run'}"
            ax.errorbar(
                mean, y + shift, xerr=std, fmt=marker, ms=4, color=PALETTE[m], mfc=face, lw=1, label=label
            )
    ax.set_yticks(range(len(models)), [display_name(name) for name in models])
    ax.set(xlabel=f"{metric.upper()} (%), mean ± standard deviation over folds")
    ax.invert_yaxis()
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
