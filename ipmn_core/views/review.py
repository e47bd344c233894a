"""Figures of the review (chapter 4): one figure per table, with a panel per modality, task or arm.

An arm has the same color in all figures. References, which train no network, are dashed or square.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ipmn_core.metrics import GLOBAL, RULES
from ipmn_core.metrics.calibration import TREAT_ALL, TREAT_NONE
from ipmn_core.names import display_name
from ipmn_core.views import style
from ipmn_core.views.results import forest, labelled, panels
from ipmn_core.views.style import BLACK, MANY, PAIRS, REFERENCES, SMALL, centers_in, color, in_order

DEFAULTS = {TREAT_ALL: "0.8", TREAT_NONE: "0.6"}


def _line(arm: str) -> dict:
    look = {"color": DEFAULTS.get(arm) or color(arm), "label": display_name(arm)}
    return look | {"linestyle": "--" if arm in REFERENCES else "-"}


def reliability_diagrams(reliability: pd.DataFrame) -> Figure:
    """Observed against predicted share of positives: a panel per modality, a line per arm, Wilson intervals.

    From `calibration.reliability`. Below the diagonal the predicted risk is too high.
    """
    axes, shown = panels(reliability, "modality", "task", 3.6, sharex=True, sharey=True)
    for ax, rows in shown:
        ax.plot((0, 1), (0, 1), color="0.75", linewidth=1, zorder=0)
        for arm, curve in rows.groupby("arm", sort=False):
            x, y, hue = curve["predicted"], curve["observed"], color(arm)
            ax.plot(x, y, linewidth=1.2, **_line(arm))
            ax.vlines(x, curve["low"], curve["high"], color=hue, alpha=0.35, linewidth=1)
            ax.scatter(x, y, s=90 * curve["n"] / reliability["n"].max(), color=hue, alpha=0.7, zorder=3)
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    legend = "marker area: number of cases\nbar: 95 % interval"
    return labelled(axes, "mean predicted probability", "observed share of positives", legend)


def decision_curves(curve: pd.DataFrame) -> Figure:
    """Net benefit over the threshold probability: a panel per modality, a line per arm.

    From `calibration.decision_curve`. An arm is useful where it is above both gray lines.
    """
    axes, shown = panels(curve, "modality", "task", 3.2, sharex=True, sharey=True)
    top = max(curve["net_benefit"].max(), 0.01)
    for ax, rows in shown:
        for arm, line in rows.groupby("arm", sort=False):
            below = {"linewidth": 3, "zorder": 1} if arm in DEFAULTS else {"linewidth": 1.3}
            ax.plot(line["threshold"], line["net_benefit"], **_line(arm), **below)
        ax.set_ylim(-0.25 * top, 1.1 * top)  # treating all goes far below
    return labelled(
        axes, "threshold probability of the positive class", "net benefit (true positives per case)"
    )


def majority(audit_table: pd.DataFrame) -> Figure:
    """ACC of each method at each center against always answering the most common class (gray line).

    From `audit.majority_class`. A method left of the line is worse than an answer without an image.
    """
    keys = ["center", "modality", "n", "high_risk", "majority", "beaten_by"]
    table = audit_table.melt(keys, var_name="arm").assign(task="binary")
    return forest(table.rename(columns={"majority": "line"}), "accuracy (ACC); gray line: majority class")


def auc_intervals(table: pd.DataFrame, paper: pd.DataFrame | None = None) -> Figure:
    """AUC of each arm at each center with its interval: a panel per modality, a color per arm.

    From `inference.intervals`; `paper`, the paper's table 3, is drawn hollow.
    """
    table = table.assign(value=table["auc"], low=table["auc_low"], high=table["auc_high"], line=0.5)
    if paper is not None:
        keys, theirs = ["center", "modality", "arm"], {"method": "arm", "auc_mean": "paper_value"}
        table = table.merge(paper.rename(columns=theirs)[[*keys, "paper_value"]], how="left", on=keys)
        unknown = table["undefined"].where(table["paper_value"].isna(), "")
        # the paper's deviation over folds is not an interval
        table = table.assign(undefined=unknown, paper_low=np.nan, paper_high=np.nan)
    return forest(table, "AUC, 95 % interval")


def gain(table: pd.DataFrame) -> Figure:
    """Gain of each arm over a reference at each center, from `heterogeneity.gain`.

    A panel per reference (across) and modality (down).
    """
    over = [f"gain over {display_name(name)}" for name in table["over"]]
    table = table.assign(value=table["difference"], line=0, over=over)
    return forest(table, "difference in AUC, 95 % interval", column="over", row="modality", limits=None)


def cross_site(table: pd.DataFrame) -> Figure:
    """AUC of each center's own model (rows) at each center (columns), common models below the gap.

    From `centers.cross_site`: a panel per modality.
    """
    sites = centers_in(table["center"])
    common = in_order(table.loc[table["trained_at"] == GLOBAL, "arm"])
    table = table.assign(row=table["trained_at"].where(table["trained_at"] != GLOBAL, table["arm"]), task="")
    height = 1.0 + 0.27 * min(len(sites) + len(common), 2 * MANY)
    axes, shown = panels(table, "modality", "task", height, sharey=True)
    for ax, rows in shown:
        own = rows[rows["trained_at"] != GLOBAL].pivot(index="trained_at", columns="center", values="auc")
        others = rows[rows["trained_at"] == GLOBAL].pivot(index="arm", columns="center", values="auc")
        cells = pd.concat([own.reindex(sites), others.reindex(common)]).reindex(columns=sites).to_numpy()
        names = [*sites, *map(display_name, common)]
        image = ax.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), auc in np.ndenumerate(cells if len(sites) <= MANY else cells[:0]):
            look = {"color": "white" if auc > 0.6 else BLACK, "fontsize": SMALL}
            ax.text(j, i, f"{auc:.2f}".replace("nan", "n/a"), ha="center", va="center", **look)
        style.name_ticks(ax.xaxis, sites)
        every = slice(None, None, -(-len(names) // (2 * MANY)))
        ax.set_yticks(range(len(names))[every], [style.short(name) for name in names[every]], fontsize=SMALL)
        ax.axhline(len(sites) - 0.5, color="white", linewidth=6)
    if shown:
        axes[0, 0].figure.colorbar(image, ax=axes, label="AUC within the center", shrink=0.7)
    return labelled(axes, "tested at", "trained at")


def fusion(table: pd.DataFrame) -> Figure:
    """Gain in AUC of each modality over the reference, on the same patients: a panel per arm.

    From `inference.compare_modalities`.
    """
    over = f"difference in AUC from {display_name(table['reference'].iloc[0])}, 95 % interval"
    table = table.assign(center=table["modality"], method=table["arm"], value=table["difference"], line=0)
    return forest(table, over, ylabel="", column="method", limits=None)


def _side_by_side(table: pd.DataFrame, columns: dict[str, str], xlabel: str) -> Figure:
    """The forest of columns of one table, with one row per arm and without empty columns."""
    keys = ["task", "modality", "center", "undefined"]
    table = table.assign(undefined=table.get("undefined", ""))
    table = table.rename(columns={"arm": "center", **columns})[[*keys, *columns.values()]]
    table = table.dropna(axis=1, how="all").melt(keys, var_name="arm")
    return forest(table.assign(line=0.5), xlabel, "arm", limits=None)


def within_and_between(table: pd.DataFrame) -> Figure:
    """AUC of each arm over all pairs, over pairs within a center, and over pairs between centers.

    From `centers.decompose`. If pooled is well above within, the arm recognizes the center.
    """
    return _side_by_side(table, PAIRS, "AUC")


def dial(table: pd.DataFrame) -> Figure:
    """AUC within centers against the phantom's shift: a panel per intensity (across) and modality (down).

    From `sweeps.dial_table`. One color per arm, one point per fold, a line through the means; the
    oracle is dashed.
    """
    axes, shown = panels(table, "intensity", "modality", 3.4, sharex=True, sharey=True)
    for ax, rows in shown:
        for arm in in_order(rows["arm"]):
            mine = rows[rows["arm"] == arm]
            mean = mine.groupby("shift")["within"].mean()
            ax.plot(mean.index, mean, linewidth=1.6, marker=None if arm in REFERENCES else "o", **_line(arm))
            if arm not in REFERENCES:
                ax.scatter(mine["shift"], mine["within"], s=8, color=color(arm), alpha=0.5)
        ax.axhline(0.5, color="0.8", linewidth=0.8, zorder=0)
    return labelled(axes, "phantom_shift: how much scanners differ", "AUC within centers")


def strategies(table: pd.DataFrame) -> Figure:
    """AUC of each strategy within centers and, unless it is personal, over all centers.

    From `centers.by_strategy`.
    """
    columns = {"within": PAIRS["within"], "auc_mean": "over all centers"}
    return _side_by_side(table.assign(task="binary"), columns, "AUC")


def optimism(table: pd.DataFrame) -> Figure:
    """Global AUC of each arm under three rules for choosing the epoch: a panel per task and modality.

    From `metrics.optimism`. Without an inner split there are two rules.
    """
    return _side_by_side(table, RULES, "global AUC, mean over folds")
