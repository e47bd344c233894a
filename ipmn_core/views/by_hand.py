"""FedProx by hand: two centers, two weights, every local step, drawn in the plane of the weights.

A logistic regression on two findings. The centers' patients are alike, but each center measures on scales of
its own (two scanners, two protocols), so that each has an optimum of its own. `federated` does the learning;
this file draws cases, notes where the weights went, and makes the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import nn
from torch.nn import functional as F

from ipmn_core import federated
from ipmn_core.views.live import LiveView
from ipmn_core.views.style import BLACK, PALETTE, SMALL, WIDTH

SERVER = "server"
WEIGHTS = ["w_0", "w_1"]
RUN = ["optimizer", "mu"]
SEED = 1423  # of the first 3000, one whose two centers have nearly one optimum at heterogeneity 0
TRUE_WEIGHTS = (1.25, 1.25)  # of the log odds from which the labels are drawn, before the scales
LARGEST_SCALE = 2.0  # at heterogeneity 1
VOXELS = 2**3  # of the smallest cube that `federated` can turn; the first two hold the findings
COLORS = {"A": PALETTE[0], "B": PALETTE[1], SERVER: BLACK, "all": BLACK}
LIMITS = (-0.2, 2.8)  # of both weights, the same for all settings, so that pictures compare
GRID = np.linspace(*LIMITS, 61)
RISES = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5)  # of the contours, in nats above an objective's least value
LEAST_TOP = 1.2  # of the axis of drift, for the same reason; more where a drift is larger
APART = 0.13  # in weights: numbers of rounds nearer than this would overlap
HALO = [withStroke(linewidth=2, foreground="white")]


class TwoWeights(nn.Module):
    """Logistic regression without intercept, both weights 0: cubes (N, 1, 2, 2, 2) to logits (N, 2)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits(points(x), self.w)


class PlainLearner(federated.Learner):
    """A learner with plain SGD, as in FedProx's paper (Li et al. 2020), in place of AdamW."""

    def __init__(self, name: str, model: nn.Module, indices: torch.Tensor, settings: federated.Settings):
        super().__init__(name, model, indices, settings)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, settings.lr_step, settings.lr_gamma)


OPTIMIZERS = {"SGD": (PlainLearner, 0.5), "AdamW": (federated.Learner, 0.05)}  # learner, rate


@dataclass(frozen=True)
class Centers:
    """Two centers: cases `data`, x (N, 1, 2, 2, 2) and y (N,); `clients`, case indices (N_k,) by name."""

    data: federated.Cases
    clients: dict[str, torch.Tensor]


def draw_centers(heterogeneity: float = 1.0, n_k: tuple[int, int] = (60, 20), seed: int = SEED) -> Centers:
    """Draw centers A and B with `n_k` cases, their optima farther apart the larger `heterogeneity` (0 to 1).

    Findings (x_0, x_1) are standard normal, labels drawn from the logistic of `TRUE_WEIGHTS`, so they overlap
    and the optima are finite. Then A's are multiplied by (s, 1/s) and B's by (1/s, s), s = 2^heterogeneity:
    at 0 both centers have the same distribution, and each one's optimum is its own at 0 divided by the scale.
    Raises ValueError for a heterogeneity outside 0 to 1.
    """
    if not 0 <= heterogeneity <= 1:
        raise ValueError(f"heterogeneity: {heterogeneity} is not between 0 (alike) and 1 (far apart)")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(n_k), 2))
    y = rng.random(sum(n_k)) < 1 / (1 + np.exp(-x @ TRUE_WEIGHTS))
    clients = dict(zip("AB", torch.arange(sum(n_k)).split(n_k), strict=True))
    for name, indices in clients.items():
        x[indices] *= scale(name, heterogeneity)
    cubes = F.pad(torch.from_numpy(x).float(), (0, VOXELS - 2)).view(-1, 1, 2, 2, 2)
    return Centers(federated.Cases(cubes, torch.from_numpy(y).long()), clients)


def scale(client: str, heterogeneity: float) -> np.ndarray:
    """Factors of a center's two findings: (s, 1/s) for A, (1/s, s) for B."""
    s = LARGEST_SCALE**heterogeneity
    return np.array({"A": (s, 1 / s), "B": (1 / s, s)}[client])


def points(x: torch.Tensor) -> torch.Tensor:
    """The two findings (N, 2) of cubes (N, 1, 2, 2, 2)."""
    return x[:, 0, 0, 0]


def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Logits (N, 2) of findings `x` (N, 2): 0 for low risk, w_0 x_0 + w_1 x_1 for high risk."""
    return F.pad((x @ w)[:, None], (1, 0))


def protocol(optimizer: str, local_steps: int, rounds: int, n: int) -> federated.Settings:
    """Settings with which an epoch is one step on all of a client's cases, at a constant rate.

    `n` is the number of cases of the largest client. Raises ValueError for values that cannot train.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: {optimizer} is unknown; known are {', '.join(OPTIMIZERS)}")
    if local_steps < 1 or rounds < 1:
        raise ValueError(f"local_steps: {local_steps}, rounds: {rounds}; both must be at least 1")
    return federated.Settings(
        epochs=rounds,
        local_epochs=local_steps,
        batch_size=n,
        batches_per_epoch=None,
        lr=OPTIMIZERS[optimizer][1],
        weight_decay=0.01,  # AdamW's, as in the notebooks; plain SGD has none
        lr_step=10**9,
        lr_gamma=1.0,
        augment_prob=0.0,
        bfloat16=False,
        channels_last=False,
        seed=(0,),
    )


@federated.one_thread()
def paths(
    centers: Centers, mu: float = 0.0, local_steps: int = 20, rounds: int = 6, optimizer: str = "SGD"
) -> pd.DataFrame:
    """The weights on their way: one row per local step of each client in each round, and for the server.

    Columns optimizer, mu, round, client, step, w_0, w_1. A client's step 0 is where its round began, the
    global weights w_t; row "server" of a round holds the weights that the round ended with (Eq. 2), that of
    round 0 the start, (0, 0). They are those of `federated.fit` with the same settings, bit for bit.
    Raises ValueError for a negative `mu`, an unknown `optimizer`, no step or no round.
    """
    if mu < 0:
        raise ValueError(f"mu: {mu} is negative; 0 is FedAvg, FedProx is above")
    largest = max(map(len, centers.clients.values()))
    settings, model = protocol(optimizer, local_steps, rounds, largest), TwoWeights()
    learner = OPTIMIZERS[optimizer][0]
    learners = {name: learner(name, model, cases, settings) for name, cases in centers.clients.items()}
    rows = [(0, SERVER, 0, *model.w.tolist())]
    for round_ in range(1, rounds + 1):
        rows += _round(model, learners, centers.data, settings, federated.Strategy(mu=mu), round_)
    table = pd.DataFrame(rows, columns=["round", "client", "step", *WEIGHTS])
    table.insert(0, "optimizer", optimizer)
    table.insert(1, "mu", float(mu))
    return table


def compare(centers: Centers, mus: Sequence[float] = (0.0, 0.3, 1.0), **settings) -> pd.DataFrame:
    """The `paths` of several mu in one table; `settings` are those of `paths`."""
    return pd.concat([paths(centers, mu, **settings) for mu in mus], ignore_index=True)


def _round(model, learners, data, settings, strategy, round_) -> list[tuple]:
    """Rows of one round, after which `model` holds the server's new weights; seeds as in `federated.fit`."""
    w_t = federated.snapshot(model)
    rows, states = [], []
    for k, (name, learner) in enumerate(learners.items()):
        seed = [*settings.seed, round_, k]
        steps = _walk(model, w_t, learner, data, settings, strategy, seed)
        rows += [(round_, name, step, *w) for step, w in enumerate(steps)]
        states.append(federated.snapshot(model))
    n_k = [len(learner.indices) for learner in learners.values()]
    model.load_state_dict(federated.weighted_average(states, n_k))
    return [*rows, (round_, SERVER, 0, *model.w.tolist())]


def _walk(model, w_t, learner, *how) -> list[list[float]]:
    """The weights before and after each step of one `federated.local_update`, noted by a hook."""
    steps = [w_t["w"].tolist()]
    hook = learner.optimizer.register_step_post_hook(lambda *_: steps.append(model.w.tolist()))
    try:
        federated.local_update(model, w_t, learner, *how)
    finally:
        hook.remove()
    return steps


def drift(paths: pd.DataFrame) -> pd.DataFrame:
    """Client drift ||w_k - w_t|| of each round, as `heterogeneity.drift` computes it for runs.

    Columns optimizer, mu, round, client, distance.
    """
    clients = paths[paths["client"] != SERVER]
    ends = clients.groupby([*RUN, "round", "client"], sort=False)[WEIGHTS].agg(["first", "last"])
    first, last = (ends.xs(which, axis=1, level=1).to_numpy() for which in ("first", "last"))
    return ends.index.to_frame(index=False).assign(distance=np.linalg.norm(last - first, axis=1))


@federated.one_thread()
def optima(centers: Centers) -> pd.DataFrame:
    """Weights at which Eq. (1) is least for A's cases, for B's and for all, the federation's aim.

    Columns client ("A", "B", "all"), w_0, w_1, and `loss`, the objective there. That of all cases is
    sum_k N_k F_k / sum_k N_k, the mean loss over all of them.
    """
    everything = {**centers.clients, "all": torch.cat(list(centers.clients.values()))}
    rows = [(name, *_optimum(centers.data, cases)) for name, cases in everything.items()]
    return pd.DataFrame(rows, columns=["client", *WEIGHTS, "loss"])


def _optimum(data: federated.Cases, cases: torch.Tensor) -> list[float]:
    """The weights that minimize the local objective of some cases, and its value; float64, by L-BFGS."""
    x, y, w = points(data.x[cases]).double(), data.y[cases], torch.zeros(2, dtype=torch.float64)
    exact = {"max_iter": 100, "tolerance_grad": 1e-10, "tolerance_change": 1e-15}
    search = torch.optim.LBFGS([w.requires_grad_()], line_search_fn="strong_wolfe", **exact)

    def objective() -> torch.Tensor:
        search.zero_grad()
        loss = federated.local_objective(logits(x, w), y)
        loss.backward()
        return loss

    search.step(objective)
    return [*w.tolist(), objective().item()]


@federated.one_thread()
def surface(centers: Centers, client: str, w_0: np.ndarray, w_1: np.ndarray) -> np.ndarray:
    """Eq. (1), F_k(w), of a client on a grid: (len(w_1), len(w_0)), float32, as contour lines want it."""
    cases = centers.clients[client]
    x, y = points(centers.data.x[cases]), centers.data.y[cases]
    grid = torch.cartesian_prod(*(torch.tensor(w, dtype=x.dtype) for w in (w_1, w_0))).flip(1)
    objective = torch.vmap(lambda w: federated.local_objective(logits(x, w), y))
    return objective(grid).view(len(w_1), len(w_0)).numpy()


def _plane(ax: Axes, centers: Centers, paths: pd.DataFrame) -> None:
    """Draw both objectives, Eq. (1), as contours, their optima, every local step, the server's rounds.

    `paths` are of one mu.
    """
    *own, of_all = optima(centers).itertuples(index=False)
    for best, cases in zip(own, centers.clients.values(), strict=True):
        rise, hue = surface(centers, best.client, GRID, GRID) - best.loss, COLORS[best.client]
        ax.contour(GRID, GRID, rise, RISES, colors=hue, linewidths=0.6, alpha=0.45, zorder=1)
        label = f"local steps of {best.client}, {len(cases)} cases"
        for _, walk in paths[paths["client"] == best.client].groupby("round"):
            ax.plot(walk["w_0"], walk["w_1"], ".-", ms=2.5, lw=0.9, color=hue, label=label)
            label = None
        _star(ax, best, f"optimum of {best.client}")
    _server(ax, paths[paths["client"] == SERVER])
    _star(ax, of_all, "optimum of all cases")
    (mu,), (optimizer,), steps = paths["mu"].unique(), paths["optimizer"].unique(), paths["step"].max()
    method = "FedProx" if mu > 0 else "FedAvg"
    walked = f"{steps} local step{'' if steps == 1 else 's'} of {optimizer} per round"
    ax.set(xlim=LIMITS, ylim=LIMITS, aspect="equal", title=f"{method}, $\\mu$ = {mu:g}\n{walked}")
    ax.set(xlabel="weight $w_0$ (finding 0)", ylabel="weight $w_1$ (finding 1)")


def _star(ax: Axes, optimum: tuple, label: str) -> None:
    look = {"marker": "*", "linestyle": "none", "ms": 10, "mec": "white", "zorder": 5}
    ax.plot(optimum.w_0, optimum.w_1, color=COLORS[optimum.client], label=label, **look)


def _server(ax: Axes, server: pd.DataFrame) -> None:
    """Draw the global weights, with the numbers of their rounds where there is room for them."""
    look = {"ms": 3.5, "lw": 1.4, "color": COLORS[SERVER], "label": "server, by round $t$"}
    ax.plot(server["w_0"], server["w_1"], "o-", **look)
    last = np.full(2, np.inf)
    for row in server[::-1].itertuples():  # the last round always has its number
        here = np.array([row.w_0, row.w_1])
        if not np.linalg.norm(here - last) < APART:
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
            ax.annotate(str(row.round), here, path_effects=HALO, zorder=6, **place)
            last = here


def _drift(ax: Axes, distances: pd.DataFrame) -> None:
    """Draw the distances of `drift` over rounds, a line per client."""
    for client, rows in distances.groupby("client"):
        ax.plot(rows["round"], rows["distance"], "o-", ms=3.5, color=COLORS[client])
    top = 1.05 * max(LEAST_TOP, distances["distance"].max())
    ax.set(xlabel="round", ylabel="drift $\\Vert w_k - w_t \\Vert$")
    ax.set(xlim=(0.5, distances["round"].max() + 0.5), ylim=(0, top))
    ax.xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Figure, ax: Axes) -> Figure:
    """The figure, with all that is drawn on `ax` named below its axes, a column per client."""
    place = {"loc": "outside lower center", "ncols": 3, "fontsize": SMALL}
    figure.legend(*ax.get_legend_handles_labels(), **place)
    return figure


def view(centers: Centers, paths: pd.DataFrame) -> Figure:
    """The plane of the weights and, beside it, the drift, of paths of one mu."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.6), width_ratios=(3, 2), layout="constrained")
    _plane(left, centers, paths)
    _drift(right, drift(paths))
    right.set_box_aspect(1)
    return _legend(figure, left)


def beside(centers: Centers, paths: pd.DataFrame) -> Figure:
    """Plane and drift of each mu, side by side on the same axes; `paths` as of `compare`."""
    runs = [rows for _, rows in paths.groupby(RUN, sort=False)]
    rows = {"height_ratios": (3, 1), "sharex": "row", "sharey": "row"}
    figure, axes = plt.subplots(2, len(runs), figsize=(WIDTH, 5.8), squeeze=False, **rows)
    top = 1.05 * max(LEAST_TOP, drift(paths)["distance"].max())
    for (upper, lower), of_mu in zip(axes.T, runs, strict=True):
        _plane(upper, centers, of_mu)
        _drift(lower, drift(of_mu))
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    axes[1, 0].set_ylim(0, top)  # the panels share it
    return _legend(figure, axes[0, 0])


CHOICES = {"mu": (0.0, 0.1, 0.3, 1.0), "local steps": (1, 5, 20), "heterogeneity": (0.0, 0.5, 1.0)}
START = {"mu": 2, "local steps": 2, "heterogeneity": 2}  # of CHOICES


def fedprox_by_hand() -> LiveView:
    """The walk of the two centers for each of `CHOICES`, computed beforehand by `paths`, with plain SGD."""
    centers = [draw_centers(heterogeneity) for heterogeneity in CHOICES["heterogeneity"]]
    walked = {
        (m, s, h): paths(of, mu, local_steps)
        for m, mu in enumerate(CHOICES["mu"])
        for s, local_steps in enumerate(CHOICES["local steps"])
        for h, of in enumerate(centers)
    }
    clients = centers[-1].clients.items()
    state = {
        "choices": CHOICES,
        "start": START,
        "limits": LIMITS,
        "clients": [{"name": name, "color": COLORS[name], "cases": len(cases)} for name, cases in clients],
        "settings": {",".join(map(str, places)): _walks(rows) for places, rows in walked.items()},
        "planes": [_of_plane(of) for of in centers],
    }
    alt = "The plane of two weights: local steps of both centers and the server, and the drift of each round"
    return LiveView("by_hand", state, lambda: view(centers[-1], walked[tuple(START.values())]), alt)


def _walks(paths: pd.DataFrame) -> dict:
    """Walks of each client by round, the server's weights, and drift, for one setting."""
    by_client = dict(list(paths.groupby("client")))
    rounded = {name: rows.groupby("round")[WEIGHTS] for name, rows in by_client.items()}
    walks = {name: [rows.round(3).to_numpy().tolist() for _, rows in of] for name, of in rounded.items()}
    server, distances = walks.pop(SERVER), drift(paths).groupby("client")["distance"]
    return {
        "walks": walks,
        "server": [round_[0] for round_ in server],
        "drift": {name: rows.round(3).tolist() for name, rows in distances},
    }


def _of_plane(centers: Centers) -> dict:
    """Contours of each client's objective, Eq. (1), and the optima, of one heterogeneity."""
    best, ax = optima(centers), Figure().subplots()
    contours = {}
    for row in best[best["client"] != "all"].itertuples():
        rise = surface(centers, row.client, GRID, GRID) - row.loss
        segments = ax.contour(GRID, GRID, rise, RISES).allsegs
        contours[row.client] = [line.round(3).tolist() for level in segments for line in level]
    stars = [[row.client, [row.w_0, row.w_1]] for row in best.itertuples()]
    return {"contours": contours, "optima": stars}
