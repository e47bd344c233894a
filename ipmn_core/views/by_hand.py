"""FedProx by hand: two centers, two weights, every local step. What `federated` does, small enough to draw.

A logistic regression on two findings. The centers' patients are alike, but each center measures on scales of
its own (two scanners, two protocols), so that its own optimum lies elsewhere. Whatever is learnt, `federated`
and `training` learn; this file draws the cases and notes where the weights went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from ipmn_core import federated

SERVER = "server"
WEIGHTS = ["w_0", "w_1"]
RUN = ["optimizer", "mu"]
SEED = 1423  # of the first 3000, one whose two centers have nearly one optimum at heterogeneity 0
TRUE_WEIGHTS = (1.25, 1.25)  # of the log odds from which the labels are drawn, before the scales
LARGEST_SCALE = 2.0  # at heterogeneity 1
VOXELS = 2**3  # of the smallest cube that `training` can turn; the first two hold the findings


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


OPTIMIZERS = {"SGD": (PlainLearner, 0.5), "AdamW": (federated.Learner, 0.05)}  # who trains, at what rate


@dataclass(frozen=True)
class Centers:
    """Two centers: cases `data`, x (N, 1, 2, 2, 2) and y (N,); `clients`, case indices (N_k,) by name."""

    data: federated.Cases
    clients: dict[str, torch.Tensor]


def draw_centers(heterogeneity: float = 1.0, n_k: tuple[int, int] = (60, 20), seed: int = SEED) -> Centers:
    """Centers A and B with `n_k` cases, their optima the farther apart the larger `heterogeneity` (0 to 1).

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
    """What a center's two findings are multiplied by: (s, 1/s) for A, (1/s, s) for B."""
    s = LARGEST_SCALE**heterogeneity
    return np.array({"A": (s, 1 / s), "B": (1 / s, s)}[client])


def points(x: torch.Tensor) -> torch.Tensor:
    """The two findings (N, 2) of cubes (N, 1, 2, 2, 2)."""
    return x[:, 0, 0, 0]


def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Logits (N, 2) of findings `x` (N, 2): 0 for low risk, w_0 x_0 + w_1 x_1 for high risk."""
    return F.pad((x @ w)[:, None], (1, 0))


def protocol(optimizer: str, local_steps: int, rounds: int, n: int) -> federated.Settings:
    """Settings with which an epoch is one step on all of a client's cases, at a rate that never falls.

    `n` is the number of cases of the largest client. Raises ValueError for what cannot be trained with.
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
    """Where the weights went: a row for each local step of each client in each round, and for the server.

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
    """The `paths` of several mu, one below the other; `settings` are those of `paths`."""
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
    """The weights before and after each step of one `federated.local_update`, which never knows of it."""
    steps = [w_t["w"].tolist()]
    hook = learner.optimizer.register_step_post_hook(lambda *_: steps.append(model.w.tolist()))
    try:
        federated.local_update(model, w_t, learner, *how)
    finally:
        hook.remove()
    return steps


def drift(paths: pd.DataFrame) -> pd.DataFrame:
    """Client drift ||w_k - w_t|| of each round, as `heterogeneity.drift` has it of a run's.

    Columns optimizer, mu, round, client, distance.
    """
    clients = paths[paths["client"] != SERVER]
    ends = clients.groupby([*RUN, "round", "client"], sort=False)[WEIGHTS].agg(["first", "last"])
    first, last = (ends.xs(which, axis=1, level=1).to_numpy() for which in ("first", "last"))
    return ends.index.to_frame(index=False).assign(distance=np.linalg.norm(last - first, axis=1))


@federated.one_thread()
def optima(centers: Centers) -> pd.DataFrame:
    """Where Eq. (1) is least for A's cases, for B's and for all, the federation's aim.

    Columns client ("A", "B", "all"), w_0, w_1, and `loss`, the objective there. That of all cases is
    sum_k N_k F_k / sum_k N_k, the mean loss over all of them.
    """
    everything = {**centers.clients, "all": torch.cat(list(centers.clients.values()))}
    rows = [(name, *_optimum(centers.data, cases)) for name, cases in everything.items()]
    return pd.DataFrame(rows, columns=["client", *WEIGHTS, "loss"])


def _optimum(data: federated.Cases, cases: torch.Tensor) -> list[float]:
    """The weights that minimise the local objective of some cases, and its value; float64, by L-BFGS."""
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
