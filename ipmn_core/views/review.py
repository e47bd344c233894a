"""Figures of the review (chapter 4): one figure from one table, a panel per modality, task or arm.

An arm has one color in all figures; references, which train no network, are dashed or square.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ipmn_core.metrics.calibration import TREAT_ALL, TREAT_NONE
from ipmn_core.names import display_name
from ipmn_core.views import style
from ipmn_core.views.results import distinct, forest, labelled, panels, shifts
from ipmn_core.views.style import PALETTE, REFERENCES, SMALL, WIDTH, centers_in, named_rows

DEFAULTS = {TREAT_ALL: "0.8", TREAT_NONE: "0.6"}


def _no_runs() -> Figure:
    """A figure that says that no run has what it would show, for instance no federated arm."""
    figure, ax = plt.subplots(figsize=(WIDTH / 2, 0.6), layout="constrained")
    ax.text(0.5, 0.5, "n/a: no run of this kind in the profile", ha="center", va="center")
    ax.set_axis_off()
    return figure


def _line(arm: str) -> dict:
    look = {"color": DEFAULTS.get(arm) or style.color(arm), "label": display_name(arm)}
    return look | {"linestyle": "--" if arm in REFERENCES else "-"}


def reliability_diagrams(reliability: pd.DataFrame) -> Figure:
    """Observed against predicted share of high risk: a panel per modality, a line per arm, Wilson intervals.

    From `calibration.reliability`. Below the diagonal a forecast claims too much risk.
    """
    axes, shown = panels(reliability, "modality", "task", 3.6, sharex=True, sharey=True)
    for ax, rows in shown:
        ax.plot((0, 1), (0, 1), color="0.75", linewidth=1, zorder=0)
        for arm, curve in rows.groupby("arm", sort=False):
            x, y, hue = curve["predicted"], curve["observed"], style.color(arm)
            ax.plot(x, y, linewidth=1.2, **_line(arm))
            ax.vlines(x, curve["low"], curve["high"], color=hue, alpha=0.35, linewidth=1)
            ax.scatter(x, y, s=90 * curve["n"] / reliability["n"].max(), color=hue, alpha=0.7, zorder=3)
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    legend = "marker area: cases\nbar: 95 % interval"
    return labelled(axes, "mean predicted probability", "observed share of high risk", legend)


def decision_curves(curve: pd.DataFrame) -> Figure:
    """Net benefit over the threshold probability: a panel per modality, a line per arm.

    From `calibration.decision_curve`. An arm is of use where it is above both grey lines.
    """
    axes, shown = panels(curve, "modality", "task", 3.2, sharex=True, sharey=True)
    top = max(curve["net_benefit"].max(), 0.01)
    for ax, rows in shown:
        for arm, line in rows.groupby("arm", sort=False):
            below = {"linewidth": 3, "zorder": 1} if arm in DEFAULTS else {"linewidth": 1.3}
            ax.plot(line["threshold"], line["net_benefit"], **_line(arm), **below)
        ax.set_ylim(-0.25 * top, 1.1 * top)  # treating all goes far below, where nobody would act
    return labelled(axes, "threshold probability of high risk", "net benefit (true positives per case)")


def majority(audit_table: pd.DataFrame) -> Figure:
    """ACC of each method at each center against always answering the commonest class (thick line).

    From `audit.majority_class`: columns center, modality, majority and one per method, all fractions. Hollow:
    not above the majority.
    """
    other = ("center", "modality", "n", "high_risk", "majority", "beaten_by")
    heights = shifts(style.in_order(name for name in audit_table if name not in other))
    centers = centers_in(audit_table["center"])
    height = 0.45 * len(centers) + 0.6
    axes, shown = panels(audit_table, "modality", "task", height, sharex=True, sharey=True)
    for ax, rows in shown:
        y = rows["center"].map(centers.index).to_numpy()
        ax.vlines(rows["majority"], y - 0.45, y + 0.45, color="0.35", linewidth=4, label="majority class")
        for method, shift in heights.items():
            hue, above = style.color(method), rows[method] > rows["majority"]
            faces = [hue if filled else "white" for filled in above]
            ax.scatter(rows[method], y + shift, s=22, color=faces, edgecolor=hue, zorder=3)
            ax.scatter([], [], s=22, color=hue, label=display_name(method))
        named_rows(ax, centers)
    return labelled(axes, "accuracy (ACC)", "center", "hollow: not above\nthe majority class")


def _forests(table: pd.DataFrame, column: str, row: str, columns: tuple, line: float, paper=None):
    """Axes and panels of `forest`, one per value of `column` (across) and `row` (down)."""
    arms = table.assign(**{row: table.get(row, "")}).groupby(row)["arm"].nunique().max()
    height = style.row_height(arms) * table["center"].nunique() + 0.6
    axes, shown = panels(table, column, row, height, sharex=True, sharey=True)
    for ax, rows in shown:
        theirs = None if paper is None else paper[paper["modality"] == rows["modality"].iloc[0]]
        forest(rows, ax, columns, theirs, line)
    return axes, shown


def auc_intervals(table: pd.DataFrame, paper: pd.DataFrame | None = None) -> Figure:
    """AUC of each arm at each center with its interval: a panel per modality, a color per arm.

    From `inference.intervals`: columns task, center, modality, arm, auc, auc_low, auc_high, undefined (why an
    AUC is NaN). `paper`, the paper's table 3, is drawn hollow.
    """
    columns, legend = ("auc", "auc_low", "auc_high"), None
    if paper is not None:
        names = {"method": "arm", "auc_mean": "auc"}
        paper = paper.rename(columns=names).assign(auc_low=np.nan, auc_high=np.nan)
        legend = "hollow: the paper" if table["arm"].isin(paper["arm"]).any() else None
    axes, shown = _forests(table, "modality", "task", columns, 0.5, paper)
    for ax, _ in shown:
        ax.set_xlim(-0.02, 1.02)
    return labelled(axes, "AUC, 95 % interval", "center", legend)


def gain(table: pd.DataFrame) -> Figure:
    """Gain of each arm over a reference at each center: a panel per reference (across) and modality (down).

    From `heterogeneity.gain`: columns modality, arm, center, over (the reference), difference, low, high (its
    interval), undefined (why a difference is NaN).
    """
    if table.empty:
        return _no_runs()
    axes, shown = _forests(table, "over", "modality", ("difference", "low", "high"), 0)
    for ax, rows in shown:
        modality, over = rows[["modality", "over"]].iloc[0].map(display_name)
        ax.set_title(f"{modality}, gain over {over}")
    return labelled(axes, "difference in AUC, 95 % interval", "center")


def _dumbbells(table: pd.DataFrame, columns: dict, xlabel: str, line: float | None = None) -> Figure:
    """Three numbers of every arm on one line: a panel per task (down) and modality (across), a row per arm.

    Where numbers coincide, one marker encloses the other. A column without any number is left out.
    """
    table = table.assign(task=table.get("task", ""))
    arms = {task: distinct(rows["arm"]) for task, rows in table.groupby("task")}
    height = 0.3 * max(map(len, arms.values())) + 0.8
    axes, shown = panels(table, "modality", "task", height, sharex=True, sharey="row")
    looks = ("o", 7.5, PALETTE[0], None), ("s", 4, PALETTE[1], None), ("D", 8, PALETTE[4], "none")
    for ax, rows in shown:
        names = arms[rows["task"].iloc[0]]
        numbers = rows.set_index("arm")[list(columns)].reindex(names).astype(float)
        y = np.arange(len(names))
        named_rows(ax, names)
        ax.hlines(y, numbers.min(axis=1), numbers.max(axis=1), color="0.6", linewidth=1.2, zorder=1)
        if line is not None:
            ax.axvline(line, color="0.6", linewidth=1, zorder=0.5)
        for (column, label), (marker, size, hue, face) in zip(columns.items(), looks, strict=True):
            if numbers[column].notna().any():
                ax.plot(numbers[column], y, marker, ms=size, color=hue, mfc=face, label=label)
    return labelled(axes, xlabel, "arm")


def within_and_between(table: pd.DataFrame) -> Figure:
    """Pooled AUC of each arm beside that of pairs from one center and of pairs from two.

    From `centers.decompose`: columns task, modality, arm, pooled, within, between. Pooled well above within:
    the arm knows the center.
    """
    columns = {"pooled": "all pairs (pooled)", "within": "within a center", "between": "between centers"}
    return _dumbbells(table, columns, "AUC", line=0.5)


def optimism(table: pd.DataFrame) -> Figure:
    """Global AUC of each arm under three rules of choosing the epoch: a panel per task and modality.

    From `metrics.optimism`: columns task, modality, arm, best_test, best_inner (NaN without an inner split:
    left out), last.
    """
    columns = {"best_test": "best on test fold", "best_inner": "best on inner split", "last": "last epoch"}
    return _dumbbells(table, columns, "global AUC, mean over folds")


def drift(table: pd.DataFrame) -> Figure:
    """Distance of each client from the global model by round: a panel per arm (across) and modality (down).

    From `heterogeneity.drift`: columns modality, arm, fold, round, client, distance. A color per client, a
    thin line per fold, a thick one their mean.
    """
    if table.empty:
        return _no_runs()
    axes, shown = panels(table, "arm", "modality", 2.5, sharex=True, sharey=True)
    rounds, clients = table["round"].unique(), centers_in(table["client"])
    few = len(rounds) <= 10  # room to set clients beside each other and to mark every round
    for ax, rows in shown:
        for k, client in enumerate(clients):
            part = rows[rows["client"] == client]
            folds = part.pivot(index="round", columns="fold", values="distance")
            x = folds.index + few * 0.06 * (k - (len(clients) - 1) / 2)
            look = {"color": style.color(client), "marker": "o" if few else None}
            ax.plot(x, folds, alpha=0.4, linewidth=0.6, markersize=2, **look)
            ax.plot(x, folds.mean(axis=1), linewidth=1.8, markersize=4, label=client, **look)
        if few:
            ax.set(xticks=rounds, xlim=(rounds.min() - 0.5, rounds.max() + 0.5))
    return labelled(axes, "round", "distance from the\nglobal model (no unit)", "client")


def cosines(matrices: pd.DataFrame) -> Figure:
    """Cosine between the updates of every two clients: a panel per arm (across) and modality (down).

    From `heterogeneity.cosines`: columns modality, arm, client, other, cosine (mean over rounds and folds).
    The colors run from -1 to 1.
    """
    if matrices.empty:
        return _no_runs()
    clients = centers_in(matrices["client"])
    axes, shown = panels(matrices, "arm", "modality", 2.8, sharex=True, sharey=True)
    for ax, rows in shown:
        cells = rows.pivot(index="client", columns="other", values="cosine")
        cells = cells.reindex(index=clients, columns=clients)
        image = ax.imshow(cells, cmap="RdBu_r", vmin=-1, vmax=1)
        for (i, j), cosine in np.ndenumerate(cells):
            text = "n/a" if np.isnan(cosine) else f"{round(cosine, 2) + 0:.2f}"  # not -0.00
            hue = "white" if abs(cosine) > 0.6 else "black"
            ax.text(j, i, text, color=hue, fontsize=SMALL, ha="center", va="center")
        ax.set_xticks(range(len(clients)), clients, fontsize=SMALL)
        ax.set_yticks(range(len(clients)), clients, fontsize=SMALL)
    axes[0, 0].figure.colorbar(image, ax=axes, label="cosine between updates", shrink=0.7)
    return labelled(axes, "client", "client")
