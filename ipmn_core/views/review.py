"""Static figures of the review: each lays out a figure of its own from one table, and returns it.

An arm has the same colour in every figure; reference arms, which train no network, are dashed or square.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ipmn_core.metrics import GLOBAL
from ipmn_core.metrics.calibration import TREAT_ALL, TREAT_NONE
from ipmn_core.names import CENTERS, display_name
from ipmn_core.views import figures
from ipmn_core.views.figures import METHODS, PALETTE, REFERENCES, SMALL, WIDTH

TASKS = {"binary": "High risk", "three_class": "Three classes"}
DEFAULTS = {TREAT_ALL: "0.8", TREAT_NONE: "0.6"}


def _panels(table: pd.DataFrame, column: str, row: str, height: float, **share):
    """Axes (rows, columns), and axes and rows of the table of each panel that has any.

    A panel stands for a value of `column` (across) and of `row` (down, if the table has it).
    """
    table = table.assign(**{row: table.get(row, "")})
    down, across = _values(table[row]), _values(table[column])
    size = min(WIDTH, 1.5 + 4 * len(across)), height * len(down) + 0.3
    axes = plt.subplots(len(down), len(across), figsize=size, squeeze=False, layout="constrained", **share)[1]
    groups, panels = dict(list(table.groupby([row, column]))), []
    for (i, j), ax in np.ndenumerate(axes):
        key = down[i], across[j]
        ax.set_title(", ".join(TASKS.get(name, display_name(name)) for name in key if name))
        if key in groups:
            panels.append((ax, groups[key]))
        else:
            ax.set_title(f"{ax.get_title()}: no runs")
            ax.set_axis_off()
    return axes, panels


def _no_runs() -> Figure:
    """A figure that says that no run has what it would show, for instance no federated arm."""
    figure, ax = plt.subplots(figsize=(WIDTH / 2, 0.6), layout="constrained")
    ax.text(0.5, 0.5, "n/a: no run of this kind in the profile", ha="center", va="center")
    ax.set_axis_off()
    return figure


def _values(names: pd.Series) -> list[str]:
    """Distinct values: tasks and modalities sorted, arms in order of appearance."""
    values = list(dict.fromkeys(names))
    return sorted(values) if names.name in ("task", "modality") else values


def _labelled(axes: np.ndarray, xlabel: str, ylabel: str = "", title: str | None = None) -> Figure:
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


def _centers(names: pd.Series) -> list[str]:
    return [name for name in (*CENTERS, GLOBAL) if (names == name).any()]


def _shifts(arms: list[str]) -> dict[str, float]:
    """Height of each arm within the row of a center, which is 1 high."""
    return dict(zip(arms, np.linspace(-0.35, 0.35, len(arms)) if len(arms) > 1 else [0.0], strict=True))


def _color(arm: str) -> str:
    return DEFAULTS.get(arm) or figures.color(arm)


def _line(arm: str) -> dict:
    style = "--" if arm in REFERENCES else "-"
    return {"color": _color(arm), "linestyle": style, "label": display_name(arm)}


def reliability_diagrams(reliability: pd.DataFrame) -> Figure:
    """Observed against predicted share of high risk: a panel a modality, a line an arm, Wilson intervals.

    From `calibration.reliability`. Below the diagonal a forecast claims too much risk.
    """
    axes, panels = _panels(reliability, "modality", "task", 3.6, sharex=True, sharey=True)
    for ax, rows in panels:
        ax.plot((0, 1), (0, 1), color="0.75", linewidth=1, zorder=0)
        for arm, curve in rows.groupby("arm", sort=False):
            x, y, color = curve["predicted"], curve["observed"], _color(arm)
            ax.plot(x, y, linewidth=1.2, **_line(arm))
            ax.vlines(x, curve["low"], curve["high"], color=color, alpha=0.35, linewidth=1)
            ax.scatter(x, y, s=90 * curve["n"] / reliability["n"].max(), color=color, alpha=0.7, zorder=3)
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    legend = "marker area: cases\nbar: 95 % interval"
    return _labelled(axes, "mean predicted probability", "observed share of high risk", legend)


def decision_curves(curve: pd.DataFrame) -> Figure:
    """Net benefit over the threshold probability: a panel a modality, a line an arm.

    From `calibration.decision_curve`. An arm is of use where it lies above both grey lines.
    """
    axes, panels = _panels(curve, "modality", "task", 3.2, sharex=True, sharey=True)
    top = max(curve["net_benefit"].max(), 0.01)
    for ax, rows in panels:
        for arm, line in rows.groupby("arm", sort=False):
            below = {"linewidth": 3, "zorder": 1} if arm in (TREAT_ALL, TREAT_NONE) else {"linewidth": 1.3}
            ax.plot(line["threshold"], line["net_benefit"], **_line(arm), **below)
        ax.set_ylim(-0.25 * top, 1.1 * top)  # treating all goes far below, where nobody would act
    return _labelled(axes, "threshold probability of high risk", "net benefit (true positives per case)")


def majority(audit_table: pd.DataFrame) -> Figure:
    """ACC of each method at each center against always answering the commonest class (thick line).

    From `audit.majority_class`: columns center, modality, majority and one a method, all fractions. Hollow:
    not above the majority.
    """
    methods = [name for name in METHODS if name in audit_table]
    centers = _centers(audit_table["center"])
    axes, panels = _panels(
        audit_table, "modality", "task", 0.45 * len(centers) + 0.6, sharex=True, sharey=True
    )
    for ax, rows in panels:
        y = rows["center"].map(centers.index).to_numpy()
        ax.vlines(rows["majority"], y - 0.45, y + 0.45, color="0.35", linewidth=4, label="majority class")
        for method, shift in _shifts(methods).items():
            color, above = _color(method), rows[method] > rows["majority"]
            faces = [color if filled else "white" for filled in above]
            ax.scatter(rows[method], y + shift, s=22, color=faces, edgecolor=color, zorder=3)
            ax.scatter([], [], s=22, color=color, label=display_name(method))
        figures.named_rows(ax, centers)
    return _labelled(axes, "accuracy (ACC)", "center", "hollow: not above\nthe majority class")


def _estimates(table: pd.DataFrame, column: str, row: str, columns: tuple, line: float):
    """Axes and panels with value and interval (`columns`) of every arm at every center, and a line at `line`.

    An undefined value is written as n/a, with its reason if the table has one.
    """
    table = table.assign(**{name: table.get(name, "") for name in (row, "undefined")})
    centers, most = _centers(table["center"]), table.groupby(row)["arm"].nunique().max()
    height = figures.row_height(most) * len(centers) + 0.6
    axes, panels = _panels(table, column, row, height, sharex=True, sharey=True)
    for ax, rows in panels:
        ax.axvline(line, color="0.6", linewidth=1, zorder=0.5)
        for arm, shift in _shifts(_values(rows["arm"])).items():
            found, color = rows[rows["arm"] == arm], _color(arm)
            y = found["center"].map(centers.index).to_numpy() + shift
            value, low, high = (found[name].to_numpy(float) for name in columns)
            ax.hlines(y, low, high, color=color, linewidth=1.1)
            marker = "s" if arm in REFERENCES else "o"
            ax.plot(value, y, marker, markersize=4, color=color, label=display_name(arm))
            for k in np.flatnonzero(np.isnan(value)):
                reason = found["undefined"].iloc[k]
                text = textwrap.shorten(f"n/a: {reason}" if reason else "n/a", 26, placeholder=" ...")
                look = {"color": color, "fontsize": SMALL, "va": "center", "zorder": 4}
                ax.text(0.01, y[k], text, transform=ax.get_yaxis_transform(), **look)
        figures.named_rows(ax, centers)
    return axes, panels


def auc_intervals(table: pd.DataFrame, paper: pd.DataFrame | None = None) -> Figure:
    """AUC of each arm at each center with its interval: a panel a modality, a colour an arm.

    From `inference.intervals`: columns task, center, modality, arm, auc, auc_low, auc_high, undefined (why an
    AUC is NaN). `paper`, the paper's table 3, is drawn hollow beside.
    """
    axes, panels = _estimates(table, "modality", "task", ("auc", "auc_low", "auc_high"), line=0.5)
    centers = _centers(table["center"])
    for ax, rows in panels:
        ax.set_xlim(-0.02, 1.02)
        shifts = _shifts(_values(rows["arm"]))
        if paper is not None and not shifts.keys().isdisjoint(paper["method"]):
            known = paper["modality"].isin(rows["modality"]) & paper["method"].isin(shifts)
            printed = paper[known & paper["center"].isin(centers)]
            y = printed["center"].map(centers.index) + printed["method"].map(shifts)
            edges = printed["method"].map(_color)
            ax.scatter(printed["auc_mean"], y, s=16, marker="D", color="white", edgecolor=edges, zorder=3)
            ax.scatter([], [], s=16, marker="D", color="white", edgecolor="0.4", label="paper")
    return _labelled(axes, "AUC, 95 % interval", "center")


def gain(table: pd.DataFrame) -> Figure:
    """What each arm gains over a reference at each center: a panel a reference (across) and modality (down).

    From `heterogeneity.gain`: columns modality, arm, center, over (the reference), difference, low, high (its
    interval), undefined (why a difference is NaN).
    """
    if table.empty:
        return _no_runs()
    axes, panels = _estimates(table, "over", "modality", ("difference", "low", "high"), line=0)
    for ax, rows in panels:
        modality, over = rows[["modality", "over"]].iloc[0].map(display_name)
        ax.set_title(f"{modality}, gain over {over}")
    return _labelled(axes, "difference in AUC, 95 % interval", "center")


def _dumbbells(table: pd.DataFrame, columns: dict, xlabel: str, line: float | None = None) -> Figure:
    """Three numbers of every arm on one line: a panel a task (down) and modality (across), a row an arm.

    Where numbers coincide, one marker encloses the other. A column without any number is left out.
    """
    table = table.assign(task=table.get("task", ""))
    arms = {task: _values(rows["arm"]) for task, rows in table.groupby("task")}
    height = 0.3 * max(map(len, arms.values())) + 0.8
    axes, panels = _panels(table, "modality", "task", height, sharex=True, sharey="row")
    looks = ("o", 7.5, PALETTE[0], None), ("s", 4, PALETTE[1], None), ("D", 8, PALETTE[4], "none")
    for ax, rows in panels:
        names = arms[rows["task"].iloc[0]]
        numbers = rows.set_index("arm")[list(columns)].reindex(names).astype(float)
        y = np.arange(len(names))
        figures.named_rows(ax, names)
        ax.hlines(y, numbers.min(axis=1), numbers.max(axis=1), color="0.6", linewidth=1.2, zorder=1)
        if line is not None:
            ax.axvline(line, color="0.6", linewidth=1, zorder=0.5)
        for (column, label), (marker, size, color, face) in zip(columns.items(), looks, strict=True):
            if numbers[column].notna().any():
                ax.plot(numbers[column], y, marker, ms=size, color=color, mfc=face, label=label)
    return _labelled(axes, xlabel, "arm")


def within_and_between(table: pd.DataFrame) -> Figure:
    """Pooled AUC of each arm beside that of pairs from one center and of pairs from two.

    From `centers.decompose`: columns task, modality, arm, pooled, within, between. Pooled well above within:
    the arm knows the center.
    """
    columns = {"pooled": "all pairs (pooled)", "within": "within a center", "between": "between centers"}
    return _dumbbells(table, columns, "AUC", line=0.5)


def optimism(table: pd.DataFrame) -> Figure:
    """Global AUC of each arm under three rules of choosing the epoch: a panel a task and modality.

    From `metrics.optimism`: columns task, modality, arm, best_test, best_inner (NaN without an inner split:
    left out), last.
    """
    columns = {"best_test": "best on test fold", "best_inner": "best on inner split", "last": "last epoch"}
    return _dumbbells(table, columns, "global AUC, mean over folds")


def drift(table: pd.DataFrame) -> Figure:
    """Distance of each client from the global model over rounds: a panel an arm (across) and modality (down).

    From `heterogeneity.drift`: columns modality, arm, fold, round, client, distance. A colour a client, a
    thin line a fold, a thick one their mean.
    """
    if table.empty:
        return _no_runs()
    axes, panels = _panels(table, "arm", "modality", 2.5, sharex=True, sharey=True)
    rounds = table["round"].unique()
    few = len(rounds) <= 10  # room to set clients beside each other and to mark every round
    for ax, rows in panels:
        for client in _centers(rows["client"]):
            k, marker = CENTERS.index(client), "o" if few else None
            part = rows[rows["client"] == client]
            folds = part.pivot(index="round", columns="fold", values="distance")
            x, look = folds.index + few * 0.06 * (k - 3), {"color": PALETTE[k], "marker": marker}
            ax.plot(x, folds, alpha=0.4, linewidth=0.6, markersize=2, **look)
            ax.plot(x, folds.mean(axis=1), linewidth=1.8, markersize=4, label=client, **look)
        if few:
            ax.set(xticks=rounds, xlim=(rounds.min() - 0.5, rounds.max() + 0.5))
    return _labelled(axes, "round", "distance from the\nglobal model (no unit)", "client")


def cosines(matrices: pd.DataFrame) -> Figure:
    """Cosine between the updates of every two clients: a panel an arm (across) and modality (down).

    From `heterogeneity.cosines`: columns modality, arm, client, other, cosine (mean over rounds and folds).
    The colours run from -1 to 1.
    """
    if matrices.empty:
        return _no_runs()
    clients = _centers(matrices["client"])
    axes, panels = _panels(matrices, "arm", "modality", 2.8, sharex=True, sharey=True)
    for ax, rows in panels:
        cells = rows.pivot(index="client", columns="other", values="cosine")
        cells = cells.reindex(index=clients, columns=clients)
        image = ax.imshow(cells, cmap="RdBu_r", vmin=-1, vmax=1)
        for (i, j), cosine in np.ndenumerate(cells):
            text = "n/a" if np.isnan(cosine) else f"{round(cosine, 2) + 0:.2f}"  # not -0.00
            color = "white" if abs(cosine) > 0.6 else "black"
            ax.text(j, i, text, color=color, fontsize=SMALL, ha="center", va="center")
        ax.set_xticks(range(len(clients)), clients, fontsize=SMALL)
        ax.set_yticks(range(len(clients)), clients, fontsize=SMALL)
    axes[0, 0].figure.colorbar(image, ax=axes, label="cosine between updates", shrink=0.7)
    return _labelled(axes, "client", "client")
