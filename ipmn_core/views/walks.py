"""Figures of `by_hand`: the plane of two weights with every step in it, and the drift of each round."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ipmn_core.views import by_hand
from ipmn_core.views.by_hand import SERVER, Centers
from ipmn_core.views.figures import BLACK, PALETTE, SMALL, WIDTH

COLORS = {"A": PALETTE[0], "B": PALETTE[1], SERVER: BLACK, "all": BLACK}
LIMITS = (-0.2, 2.8)  # of both weights, the same at every setting, so that pictures compare
GRID = np.linspace(*LIMITS, 61)
RISES = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5)  # of the contours, in nats above an objective's least value
LEAST_TOP = 1.2  # of the axis of drift, for the same reason; more where a drift is larger
APART = 0.13  # numbers of rounds nearer than this, in weights, would lie on each other
HALO = [withStroke(linewidth=2, foreground="white")]


def plane(ax: Axes, centers: Centers, paths: pd.DataFrame) -> Axes:
    """Both centers' objectives, Eq. (1), as contours; their optima; every local step; the server's rounds.

    `paths` are of one mu (`by_hand.paths`). Without a legend, which covers paths: `legend` puts one below.
    """
    *optima, of_all = by_hand.optima(centers).itertuples(index=False)
    for best, cases in zip(optima, centers.clients.values(), strict=True):
        rise = by_hand.surface(centers, best.client, GRID, GRID) - best.loss
        ax.contour(GRID, GRID, rise, RISES, colors=COLORS[best.client], linewidths=0.6, alpha=0.45, zorder=1)
        _steps(ax, paths[paths["client"] == best.client], f"local steps of {best.client}, {len(cases)} cases")
        _star(ax, best, f"optimum of {best.client}")
    _server(ax, paths[paths["client"] == SERVER])
    _star(ax, of_all, "optimum of all cases")
    ax.set(xlim=LIMITS, ylim=LIMITS, aspect="equal", title=title(paths))
    ax.set(xlabel="weight $w_0$ (finding 0)", ylabel="weight $w_1$ (finding 1)")
    return ax


def title(paths: pd.DataFrame) -> str:
    """What the paths of one mu were walked with, in words."""
    (mu,), (optimizer,), steps = paths["mu"].unique(), paths["optimizer"].unique(), paths["step"].max()
    method = "FedProx" if mu > 0 else "FedAvg"
    what = "local step" if steps == 1 else "local steps"
    return f"{method}, $\\mu$ = {mu:g}\n{steps} {what} of {optimizer} a round"


def _steps(ax: Axes, steps: pd.DataFrame, label: str) -> None:
    """A line a round, a dot a step."""
    color = COLORS[steps["client"].iloc[0]]
    for _, walk in steps.groupby("round"):
        ax.plot(walk["w_0"], walk["w_1"], ".-", ms=2.5, lw=0.9, color=color, label=label)
        label = None


def _star(ax: Axes, optimum: tuple, label: str) -> None:
    style = {"marker": "*", "linestyle": "none", "ms": 10, "mec": "white", "zorder": 5}
    ax.plot(optimum.w_0, optimum.w_1, color=COLORS[optimum.client], label=label, **style)


def _server(ax: Axes, server: pd.DataFrame) -> None:
    """The global weights, with the numbers of their rounds where there is room for them."""
    style = {"ms": 3.5, "lw": 1.4, "color": COLORS[SERVER], "label": "server, by round $t$"}
    ax.plot(server["w_0"], server["w_1"], "o-", **style)
    last = np.full(2, np.inf)
    for row in server[::-1].itertuples():  # the last round has its number in any case
        here = np.array([row.w_0, row.w_1])
        if not np.linalg.norm(here - last) < APART:
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
            ax.annotate(str(row.round), here, path_effects=HALO, zorder=6, **place)
            last = here


def drift(ax: Axes, drift: pd.DataFrame) -> Axes:
    """Drift ||w_k - w_t|| over rounds, a line a client; `drift` is of one mu (`by_hand.drift`)."""
    for client, rows in drift.groupby("client"):
        ax.plot(rows["round"], rows["distance"], "o-", ms=3.5, color=COLORS[client])
    ax.set(xlabel="round", ylabel="drift $\\Vert w_k - w_t \\Vert$")
    ax.set(xlim=(0.5, drift["round"].max() + 0.5), ylim=(0, _top(drift)))
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def _top(drift: pd.DataFrame) -> float:
    return 1.05 * max(LEAST_TOP, drift["distance"].max())


def legend(figure: Figure, ax: Axes) -> None:
    """Names everything that `plane` drew on `ax`, below the figure's axes."""
    place = {"loc": "outside lower center", "ncols": 3, "fontsize": SMALL}  # a column a client
    figure.legend(*ax.get_legend_handles_labels(), **place)


def view(centers: Centers, paths: pd.DataFrame) -> Figure:
    """The plane and, beside it, the drift, of paths of one mu."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.6), width_ratios=(3, 2), layout="constrained")
    plane(left, centers, paths)
    drift(right, by_hand.drift(paths)).set_box_aspect(1)
    legend(figure, left)
    return figure


def beside(centers: Centers, paths: pd.DataFrame) -> Figure:
    """Plane and drift of each mu, side by side on the same axes; `paths` as of `by_hand.compare`."""
    runs = [rows for _, rows in paths.groupby(by_hand.RUN, sort=False)]
    figure, axes = plt.subplots(
        2, len(runs), figsize=(WIDTH, 5.8), height_ratios=(3, 1), sharex="row", sharey="row", squeeze=False
    )
    for (upper, lower), rows in zip(axes.T, runs, strict=True):
        plane(upper, centers, rows)
        drift(lower, by_hand.drift(rows))
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    axes[1, 0].set_ylim(0, _top(by_hand.drift(paths)))  # the panels share it
    legend(figure, axes[0, 0])
    return figure
