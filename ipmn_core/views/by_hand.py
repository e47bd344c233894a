"""FedProx by hand: two centers, two weights, every local step, drawn in the plane of the weights.

A logistic regression on two findings. The centers have the same kind of patients, but each measures on its
own scales (two scanners, two protocols), so the centers have different optima. `federated` does the learning.
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
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from ipmn_core import federated
from ipmn_core.views.live import LiveView
from ipmn_core.views.style import BLACK, PALETTE, SMALL, WIDTH

SERVER = "server"
WEIGHTS = ["w_0", "w_1"]
RUN = ["optimizer", "mu"]
SEED = 1423  # of the first 3000, one whose centers have nearly the same optimum at heterogeneity 0
TRUE_WEIGHTS = (1.25, 1.25)  # of the log odds from which labels are drawn, before scaling
COLORS = {"A": PALETTE[0], "B": PALETTE[1]}
LIMITS = (-0.2, 2.8)  # of both weights, the same for all settings, so that pictures can be compared
GRID = np.linspace(*LIMITS, 61)
RISES = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5)  # contour levels, in nats above an objective's minimum
HALO = [withStroke(linewidth=2, foreground="white")]


class TwoWeights(nn.Module):
    """Logistic regression without intercept, both weights 0: cubes (N, 1, 2, 2, 2) to logits (N, 2).

    A cube's first two voxels are the findings x; the logits are 0 and w_0 x_0 + w_1 x_1, for high risk.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad((x[:, 0, 0, 0] @ self.w)[:, None], (1, 0))


class PlainLearner(federated.Learner):
    """A learner with plain SGD, as in FedProx's paper (Li et al. 2020), in place of AdamW."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        indices: torch.Tensor,
        settings: federated.Settings,
        strategy: federated.Strategy | None = None,
    ):
        super().__init__(name, model, indices, settings, strategy)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, settings.lr_step, settings.lr_gamma)


OPTIMIZERS = {"SGD": (PlainLearner, 0.5), "AdamW": (federated.Learner, 0.05)}  # learner, rate


@dataclass(frozen=True)
class Centers:
    """Two centers: `data` with x (N, 1, 2, 2, 2) and y (N,), and `clients`, case indices (N_k,) by name."""

    data: federated.Cases
    clients: dict[str, torch.Tensor]


def draw_centers(heterogeneity: float = 1.0, n_k: tuple[int, int] = (60, 20), seed: int = SEED) -> Centers:
    """Draw centers A and B with `n_k` cases; more `heterogeneity` (0 to 1) moves their optima apart.

    Findings (x_0, x_1) are standard normal, and labels follow the logistic of `TRUE_WEIGHTS`, so classes
    overlap and the optima are finite. A's findings are then multiplied by (s, 1/s) and B's by (1/s, s), with
    s = 2^heterogeneity. This divides each optimum by the scale.
    """
    rng, s = np.random.default_rng(seed), 2**heterogeneity
    x = rng.standard_normal((sum(n_k), 2))
    y = rng.random(sum(n_k)) < 1 / (1 + np.exp(-x @ TRUE_WEIGHTS))
    clients = dict(zip("AB", torch.arange(sum(n_k)).split(n_k), strict=True))
    x[clients["A"]] *= s, 1 / s
    x[clients["B"]] *= 1 / s, s
    cubes = F.pad(torch.from_numpy(x).float(), (0, 6)).view(-1, 1, 2, 2, 2)  # the smallest that turn
    return Centers(federated.Cases(cubes, torch.from_numpy(y).long()), clients)


def protocol(optimizer: str, local_steps: int, rounds: int) -> federated.Settings:
    """Settings under which an epoch is one step on all of a client's cases, at a constant rate."""
    return federated.Settings(
        epochs=rounds,
        local_epochs=local_steps,
        batch_size=10**9,
        batches_per_epoch=None,
        lr=OPTIMIZERS[optimizer][1],
        weight_decay=0.01,  # AdamW's, as in the notebooks; plain SGD has none
        lr_step=10**9,
        lr_gamma=1.0,
        augment_prob=0.0,
        seed=(0,),
    )


@federated.one_thread()
def paths(
    centers: Centers, mu: float = 0.0, local_steps: int = 20, rounds: int = 6, optimizer: str = "SGD"
) -> pd.DataFrame:
    """The weights after each local step of each client in each round, and those of the server.

    Columns round, client, step, w_0, w_1, optimizer, mu. A client's step 0 is the start of its round, the
    global weights w_t. The row "server" of a round has the weights at its end (Eq. 2); that of round 0 is the
    start, (0, 0). All equal those of `federated.fit_federated`, bit for bit.
    """
    n_k = [len(cases) for cases in centers.clients.values()]
    settings, strategy = protocol(optimizer, local_steps, rounds), federated.Strategy(mu=mu)
    model, make, walk = TwoWeights(), OPTIMIZERS[optimizer][0], []
    learners = {name: make(name, model, cases, settings) for name, cases in centers.clients.items()}
    for learner in learners.values():
        learner.optimizer.register_step_post_hook(lambda *_: walk.append(model.w.tolist()))
    rows = [(0, SERVER, 0, *model.w.tolist())]
    for round_ in range(1, rounds + 1):
        w_t, states = federated.snapshot(model), []
        for k, (name, learner) in enumerate(learners.items()):
            walk[:] = [w_t["w"].tolist()]
            seed = [*settings.seed, round_, k]
            federated.local_update(model, w_t, learner, centers.data, settings, strategy, seed)
            rows += [(round_, name, step, *w) for step, w in enumerate(walk)]
            states.append(federated.snapshot(model))
        model.load_state_dict(federated.weighted_average(states, n_k))
        rows.append((round_, SERVER, 0, *model.w.tolist()))
    table = pd.DataFrame(rows, columns=["round", "client", "step", *WEIGHTS])
    return table.assign(optimizer=optimizer, mu=float(mu))


def compare(centers: Centers, mus: Sequence[float] = (0.0, 0.3, 1.0), **settings) -> pd.DataFrame:
    """The `paths` for several mu in one table."""
    return pd.concat([paths(centers, mu, **settings) for mu in mus], ignore_index=True)


def drift(paths: pd.DataFrame) -> pd.DataFrame:
    """Client drift ||w_k - w_t||: columns optimizer, mu, round, client, distance."""
    steps = paths[paths["client"] != SERVER].groupby([*RUN, "round", "client"], sort=False)[WEIGHTS]
    moved = steps.last() - steps.first()
    return np.hypot(moved["w_0"], moved["w_1"]).rename("distance").reset_index()


def optima(centers: Centers) -> pd.DataFrame:
    """Weights that minimize Eq. (1) for A's cases, for B's and for all cases, the federation's aim.

    Columns client ("A", "B", "all"), w_0, w_1, and `loss`, the mean over these cases at the minimum.
    """
    rows = []
    for name, cases in {**centers.clients, "all": torch.cat(list(centers.clients.values()))}.items():
        x, y = centers.data.x[cases, 0, 0, 0].double().numpy(), centers.data.y[cases].numpy()
        fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y)
        rows.append((name, *fit.coef_[0], log_loss(y, fit.predict_proba(x))))
    return pd.DataFrame(rows, columns=["client", *WEIGHTS, "loss"])


@federated.one_thread()
def surface(centers: Centers, client: str, w_0: np.ndarray, w_1: np.ndarray) -> np.ndarray:
    """Eq. (1), F_k(w), of a client on a grid, (len(w_1), len(w_0)) float32, for contour lines."""
    cases, model = centers.clients[client], TwoWeights()
    x, y = centers.data.x[cases], centers.data.y[cases]
    grid = torch.cartesian_prod(*(torch.tensor(w, dtype=x.dtype) for w in (w_1, w_0))).flip(1)
    objective = torch.vmap(lambda w: federated.local_objective(functional_call(model, {"w": w}, x), y))
    return objective(grid).view(len(w_1), len(w_0)).numpy()


@plt.rc_context({"text.parse_math": True})
def beside(centers: Centers, paths: pd.DataFrame) -> Figure:
    """Plane and drift for each mu, side by side on the same axes; `paths` as from `compare`."""
    runs = [rows for _, rows in paths.groupby(RUN, sort=False)]
    rows = {"height_ratios": (3, 1), "sharex": "row", "sharey": "row"}
    figure, axes = plt.subplots(2, len(runs), figsize=(WIDTH, 5.8), squeeze=False, **rows)
    for (upper, lower), of_mu in zip(axes.T, runs, strict=True):
        _plane(upper, centers, of_mu)
        for client, far in drift(of_mu).groupby("client"):
            lower.plot(far["round"], far["distance"], "o-", ms=3.5, color=COLORS[client])
        lower.set_xlabel("round")
        lower.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("weight $w_1$ (finding 1)")
    axes[1, 0].set(ylabel="drift $\\Vert w_k - w_t \\Vert$", ylim=(0, 1.05 * drift(paths)["distance"].max()))
    place = {"loc": "outside lower center", "ncols": 3, "fontsize": SMALL}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **place)
    return figure


def _plane(ax: Axes, centers: Centers, paths: pd.DataFrame) -> None:
    """Draw both objectives, Eq. (1), as contours, all optima, and the `paths` of one mu."""
    star = {"marker": "*", "linestyle": "none", "ms": 10, "mec": "white", "zorder": 5}
    best = optima(centers).set_index("client")
    for client, cases in centers.clients.items():
        hue, label = COLORS[client], f"local steps of {client}, {len(cases)} cases"
        rise = surface(centers, client, GRID, GRID) - best.loc[client, "loss"]
        ax.contour(GRID, GRID, rise, RISES, colors=hue, linewidths=0.6, alpha=0.45, zorder=1)
        for round_, walk in paths[paths["client"] == client].groupby("round"):
            name = label if round_ == 1 else None
            ax.plot(walk["w_0"], walk["w_1"], ".-", ms=2.5, lw=0.9, color=hue, label=name)
        ax.plot(*best.loc[client, WEIGHTS], color=hue, label=f"optimum of {client}", **star)
    server = paths[paths["client"] == SERVER]
    ax.plot(server["w_0"], server["w_1"], "o-", ms=3.5, lw=1.4, color=BLACK, label="server, by round $t$")
    ax.plot(*best.loc["all", WEIGHTS], color=BLACK, label="optimum of all cases", **star)
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
    for row in server.iloc[[0, -1]].itertuples():
        ax.annotate(row.round, (row.w_0, row.w_1), path_effects=HALO, zorder=6, **place)
    mu, optimizer, steps = paths["mu"].iloc[0], paths["optimizer"].iloc[0], paths["step"].max()
    method = f"{'FedProx' if mu > 0 else 'FedAvg'}, $\\mu$ = {mu:g}"
    title = f"{method}\nlocal steps of {optimizer} per round: {steps}"
    ax.set(xlim=LIMITS, ylim=LIMITS, aspect="equal", title=title, xlabel="weight $w_0$ (finding 0)")


CHOICES = {"mu": (0.0, 0.1, 0.3, 1.0), "local steps": (1, 5, 20), "heterogeneity": (0.0, 0.5, 1.0)}
START = {"mu": 2, "local steps": 2, "heterogeneity": 2}  # of CHOICES


def fedprox_by_hand() -> LiveView:
    """A live view of the two centers' `paths` for all `CHOICES`, computed beforehand with plain SGD."""
    centers = [draw_centers(heterogeneity) for heterogeneity in CHOICES["heterogeneity"]]
    walked = {
        (m, s, h): paths(of, mu, local_steps)
        for m, mu in enumerate(CHOICES["mu"])
        for s, local_steps in enumerate(CHOICES["local steps"])
        for h, of in enumerate(centers)
    }
    clients = centers[-1].clients.items()
    state = {
        "choices": list(CHOICES.items()),  # a list, because notebook files sort the keys of a dict
        "start": START,
        "limits": LIMITS,
        "clients": [{"name": name, "color": COLORS[name], "cases": len(cases)} for name, cases in clients],
        "settings": {",".join(map(str, places)): _walks(rows) for places, rows in walked.items()},
        "planes": [_of_plane(of) for of in centers],
    }
    alt = "The plane of two weights: local steps of both centers and the server, and the drift of each round"
    return LiveView("by_hand", state, lambda: beside(centers[-1], walked[tuple(START.values())]), alt)


def _walks(paths: pd.DataFrame) -> dict:
    """The paths of each client by round, the server's weights, and the drift, for one setting."""
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
    """Contours of each client's objective, Eq. (1), and the optima, for one heterogeneity."""
    best, ax = optima(centers), Figure().subplots()
    contours = {}
    for row in best[best["client"] != "all"].itertuples():
        rise = surface(centers, row.client, GRID, GRID) - row.loss
        segments = ax.contour(GRID, GRID, rise, RISES).allsegs
        contours[row.client] = [line.round(3).tolist() for level in segments for line in level if len(line)]
    stars = [[row.client, [row.w_0, row.w_1]] for row in best.itertuples()]
    return {"contours": contours, "optima": stars}
