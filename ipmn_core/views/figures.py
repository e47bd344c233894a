"""Static figures: each draws on the axes it is given, or lays out a figure of its own, and returns it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.metrics import roc_curve

from ipmn_core import disk, metrics
from ipmn_core.names import CENTERS, display_name

# Okabe and Ito's palette: told apart with any common colour vision
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6F6F6F")
BLACK = "#000000"
METHODS = ("centralized", "fedavg", "fedprox_0.1", "fedprox_0.3", "local_only")
MODELS = ("resnet34", "shufflenetv2", "mobilenetv2", "efficientnetb0", "densenet121")
REFERENCES = ("center_only", "header_only", "histogram_only", "oracle", "guideline")
# one colour an arm in every figure; references, which train no network, repeat two, dashed or square
COLORS = {arm: PALETTE[k] for arms in (METHODS, MODELS) for k, arm in enumerate(arms)}
COLORS |= dict(zip(REFERENCES, (*PALETTE[5:], PALETTE[2], BLACK, PALETTE[3]), strict=True))
COLORS |= {"t1": PALETTE[5], "t2": BLACK}  # no arm's colour: T1 and T2 stand beside each other in an arm
WIDTH = 9  # inches: a page that shows a figure 900 pixels wide shows letters of 8 points 11 pixels high
SMALL = 8  # points, the smallest letters
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def color(arm: str) -> str:
    """The colour of an arm or a modality in every figure; dark grey for one that `COLORS` does not know."""
    return COLORS.get(arm, "0.4")


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
    panels = {
        "in_plane_mm": ("in-plane voxel size", "mm"),
        "slice_mm": ("slice thickness", "mm"),
        "roi_median": ("median intensity in the ROI", "as stored, no unit"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6))
    for ax, (column, (title, unit)) in zip(axes, panels.items(), strict=True):
        _strip(ax, facts, column)
        ax.set(title=title, xlabel="center", ylabel=unit)
    axes[2].set_yscale("log")
    _beside(axes[2], "a point: a scan", markerscale=2)
    return figure


def _strip(ax: Axes, facts: pd.DataFrame, column: str) -> None:
    rng = np.random.default_rng(0)
    centers = [c for c in CENTERS if (facts["center"] == c).any()]
    for m, (modality, rows) in enumerate(facts.groupby("modality")):
        x = rows["center"].map(centers.index) + 0.3 * m - 0.15 + rng.uniform(-0.08, 0.08, len(rows))
        ax.scatter(x, rows[column], s=7, alpha=0.5, color=color(modality), label=display_name(modality))
    ax.set_xticks(range(len(centers)), centers, fontsize=SMALL)


def _beside(ax: Axes, title: str | None = None, **look) -> None:
    """A legend right of the axes, where it covers no data."""
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=title, **look)


def training_curves(
    histories: pd.DataFrame, column: str, ylabel: str, xlabel: str, reference: float | None = None
) -> Figure:
    """`column` of the histories over epochs: a panel an arm, a thin line a fold, a thick one their mean."""
    arms = list(dict.fromkeys(histories["arm"]))
    size = min(WIDTH, 1 + 2 * len(arms)), 2.3
    figure, axes = plt.subplots(1, len(arms), figsize=size, sharey=True, squeeze=False)
    for ax, arm in zip(axes[0], arms, strict=True):
        for modality, rows in histories[histories["arm"] == arm].groupby("modality"):
            folds = rows.pivot(index="epoch", columns="fold", values=column)
            look = {"color": color(modality), "marker": "."}
            ax.plot(folds.index, folds, alpha=0.35, linewidth=0.8, markersize=3, **look)
            name = display_name(modality)
            ax.plot(folds.index, folds.mean(axis=1), linewidth=2, markersize=8, label=name, **look)
        if reference is not None:
            ax.axhline(reference, color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=display_name(arm), xlabel=xlabel)
        _whole_epochs(ax, histories.loc[histories["arm"] == arm, "epoch"])
    axes[0, 0].set_ylabel(ylabel)
    if histories[column].max() > max(1, 5 * histories[column].min()) and histories[column].min() > 0:
        _by_factors(axes[0, 0])  # a loss that one arm begins high; an AUC is never above 1
    _beside(axes[0, -1], "thin: a fold\nthick: mean")
    return figure


def _by_factors(ax: Axes) -> None:
    """A logarithmic y axis that is labelled in plain numbers: 1, 2, 5, 10."""
    ax.set_yscale("log")
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def _whole_epochs(ax: Axes, epochs: pd.Series) -> None:
    """Ticks at whole epochs only, also where there is but one, half an epoch of room at either end."""
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)
    ax.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)


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
        _markers(ax, ours, centers, shift, metric, color(arm), "o", display_name(arm))
        if paper is not None:
            theirs = paper[paper["method"] == arm].set_index("center")
            _markers(ax, theirs, centers, shift + 0.06, metric, color(arm), "D", None)
    if metric == "auc":
        ax.axvline(0.5, color="0.8", linewidth=0.8, zorder=0)  # chance; an accuracy has no such line
    named_rows(ax, centers)
    ax.set(xlabel=f"{metric.upper()}, mean ± standard deviation over folds", xlim=(-0.05, 1.05))
    return ax


def named_rows(ax: Axes, names: list[str]) -> None:
    """Names down the y axis, the first on top, every other row shaded."""
    ax.set_yticks(range(len(names)), [display_name(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    for k in range(0, len(names), 2):
        ax.axhspan(k - 0.5, k + 0.5, color="0.95", linewidth=0, zorder=-1)


def row_height(arms: int) -> float:
    """Inches that the row of a center needs for so many arms, each with a line of small letters."""
    return 0.13 * arms + 0.12


def forests(summary: pd.DataFrame, metric: str = "auc", paper: pd.DataFrame | None = None) -> Figure:
    """The binary task's forest plots, a panel a modality; `paper` (its table 3) is drawn hollow beside."""
    binary = summary[summary["task"] == "binary"]
    modalities = sorted(binary["modality"].unique())
    height = row_height(binary["arm"].nunique()) * binary["center"].nunique() + 0.6
    size = min(WIDTH, 1.5 + 4 * len(modalities)), height
    figure, axes = plt.subplots(1, len(modalities), figsize=size, sharey=True, squeeze=False)
    for ax, modality in zip(axes[0], modalities, strict=True):
        theirs = None if paper is None else paper[paper["modality"] == modality]
        forest(binary[binary["modality"] == modality], ax, metric, theirs)
        ax.set_title(f"High risk, {display_name(modality)}")
    axes[0, 0].set_ylabel("center")
    _beside(axes[0, -1], "filled: this run\nhollow: the paper" if paper is not None else None)
    return figure


def _markers(ax, table, centers, shift, metric, hue, marker, label) -> None:
    table = table.reindex([c for c in centers if c in table.index])
    y = np.array([centers.index(c) for c in table.index]) + shift
    mean, std = table[f"{metric}_mean"].to_numpy(float), table[f"{metric}_std"].to_numpy(float)
    face = hue if label else "white"
    ax.errorbar(mean, y, xerr=std, fmt=marker, ms=3.5, color=hue, mfc=face, lw=0.9, label=label)
    for row in y[np.isnan(mean)]:
        ax.text(0.5, row, "n/a", color=hue, fontsize=SMALL, va="center", ha="center")


def roc(selected: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """ROC curves of the binary task, a colour a method, the test folds' scores pooled.

    Where the cases are all of one class there is no curve, and the panel says so.
    """
    if selected.empty:
        return _empty(ax, title)
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
        _beside(ax, "AUC", handlelength=1)
    return ax


def _empty(ax: Axes, title: str) -> Axes:
    ax.set_axis_off()
    ax.set_title(f"{title}: no cases")
    return ax


def roc_together(selected: pd.DataFrame, ax: Axes) -> Axes:
    """The ROC of all centers together, without `local_only`: its models' scores share no scale to pool."""
    name = display_name(metrics.GLOBAL)
    roc(selected[selected["arm"] != "local_only"], ax, name)
    if len(selected) and not ax.lines:
        ax.set_title(f"{name}: scores of no common scale")
    return ax


def roc_by_center(selected: pd.DataFrame) -> Figure:
    """A ROC panel for all centers together and for each center, one modality of the binary task.

    The AUCs stand right of each panel, the methods' names once below.
    """
    centers = [c for c in CENTERS if (selected["center"] == c).any()]
    columns = 4
    down = -(-(len(centers) + 1) // columns)
    figure, axes = plt.subplots(down, columns, figsize=(WIDTH, 2.1 * down + 0.4), squeeze=False)
    panels = [roc_together(selected, axes.flat[0])]
    for ax, center in zip(axes.flat[1:], centers, strict=False):
        panels.append(roc(selected[selected["center"] == center], ax, center))
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    _share_legend(panels)
    return figure


def _share_legend(panels: list[Axes]) -> None:
    """One legend below all ROC panels for the methods' names; each panel keeps its AUCs, beside it."""
    names = {}
    for ax in panels:
        lines, labels = ax.get_legend_handles_labels()
        named = [label.rsplit(" ", 1) for label in labels]  # name, AUC
        names |= {name: line for line, (name, _) in zip(lines, named, strict=True)}
        if lines:
            look = {"loc": "center left", "bbox_to_anchor": (0.98, 0.5), "handlelength": 0.7}
            ax.legend(lines, [auc for _, auc in named], title="AUC", handletextpad=0.4, **look)
    if names:
        panels[0].figure.legend(names.values(), names, loc="outside lower center", ncols=len(names))


def score_histogram(selected: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Predicted probability of high risk of one method, cases of high risk against the rest."""
    if selected.empty:
        return _empty(ax, title)
    y, prob = metrics.y_and_prob(selected)
    bins, hues = np.linspace(0, 1, 21), (PALETTE[6], PALETTE[4])
    ax.hist([prob[y == 0, 1], prob[y == 1, 1]], bins, label=["rest", "high risk"], color=hues)
    ax.set(title=title, xlabel="predicted probability of high risk", ylabel="cases")
    ax.locator_params(axis="y", integer=True)
    ax.legend()
    return ax


def against_paper(table: pd.DataFrame, metric: str = "auc") -> Figure:
    """Table 2 as a picture: a metric in percent for each model, ours filled, the paper's hollow."""
    models = list(dict.fromkeys(table["model"]))
    figure, ax = plt.subplots(figsize=(WIDTH, 0.5 * len(models) + 0.7))
    for m, (modality, part) in enumerate(table.groupby("modality")):
        y, hue = part["model"].map(models.index) + 0.36 * m - 0.24, color(modality)
        for suffix, face, marker, shift in (("", hue, "o", 0), ("_paper", "white", "D", 0.14)):
            mean, std = part[f"{metric}_mean{suffix}"], part[f"{metric}_std{suffix}"]
            label = f"{display_name(modality)}, {'paper' if suffix else 'this run'}"
            ax.errorbar(mean, y + shift, xerr=std, fmt=marker, ms=5, color=hue, mfc=face, lw=1, label=label)
    named_rows(ax, models)
    ax.set(xlabel=f"{metric.upper()} (%), mean ± standard deviation over folds", ylabel="network")
    _beside(ax)
    return figure
