"""Federated strategies by name, one entry each: what a client adds to its steps, what it keeps, and how the
server makes the next weights.

Notation: w_t are the global weights of round t, w_k those of client k after its local update, N_k its cases,
p_k = N_k / sum N_k, g a gradient of F_k, Eq. (1). Every strategy averages by Eq. (2), with weights p_k, also
where its reference uses equal weights. Local steps are AdamW's, as in the paper.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ipmn_core.federated.equations import State

CONTROL = "control."  # prefix of a control variate's tensors, which travel with the weights
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
BETA1, BETA2, TAU = 0.9, 0.99, 1e-3  # of FedAdam, as in its reference


@dataclass(frozen=True)
class Strategy:
    """How clients learn together: FedAvg by default, FedProx if `mu` > 0.

    Departs from the paper: all other fields. `adam` and `scaffold` are learning rates of the server, `ditto`
    is the pull to the global model, `finetune` a rate in units of `lr`. `clients_per_round` clients are drawn
    for each round (None: all).
    """

    mu: float = 0.0
    batch_norm: Literal["averaged", "own", "own statistics", "recomputed"] = "averaged"
    adam: float | None = None
    scaffold: float | None = None
    ditto: float | None = None
    finetune: float | None = None
    clients_per_round: int | None = None

    @property
    def personal(self) -> bool:
        """Whether each client is tested with its own model."""
        return self.batch_norm != "averaged" or self.ditto is not None or self.finetune is not None

    @property
    def trains_alone(self) -> bool:
        """Whether clients also train models that they never send; not available across machines."""
        return self.ditto is not None or self.finetune is not None


STRATEGIES = {
    # w = sum p_k w_k, BatchNorm's statistics included. McMahan et al., AISTATS 2017
    "fedavg": Strategy(),
    # g + mu (w - w_t), Eq. (3). Li et al., MLSys 2020
    "fedprox_0.1": Strategy(mu=0.1),
    "fedprox_0.3": Strategy(mu=0.3),
    # BatchNorm's weights and statistics stay at the client. Li et al., ICLR 2021
    "fedbn": Strategy(batch_norm="own"),
    # ablations: only the statistics stay (Andreux et al., DART 2020), or they are recomputed on the client's
    # training cases with the averaged weights before each test
    "fedavg_bn_local": Strategy(batch_norm="own statistics"),
    "fedavg_bn_recomputed": Strategy(batch_norm="recomputed"),
    # m = b1 m + (1 - b1) d, v = b2 v + (1 - b2) d^2, w = w_t + rate m / (sqrt(v) + tau), with the mean update
    # d = sum p_k (w_k - w_t). Reddi et al., ICLR 2021, algorithm 2
    "fedadam": Strategy(adam=0.01),
    # g - c_k + c; then c_k' = mean of g over the round's steps, w = w_t + rate d, c' = c + sum p_k (c_k' -
    # c_k). Karimireddy et al., ICML 2020, algorithm 1: of plain SGD its option II is this mean. Under AdamW
    # the corrected gradient passes through the moments, as FedProx's does
    "scaffold": Strategy(scaffold=1.0),
    # besides FedAvg's w, each client trains v_k with g(v_k) + lambda (v_k - w_t) and a second AdamW, and is
    # tested with v_k. Li et al., ICML 2021, algorithm 1
    "ditto_0.1": Strategy(ditto=0.1),
    # FedAvg's rounds, then epochs at each client alone, at 0.1 `lr`. Wang et al., 2019 (arXiv 1910.10252)
    "finetune": Strategy(finetune=0.1),
}
VALUES = {"fedprox": "mu", "fedadam": "adam"} | {name: name for name in ("scaffold", "ditto", "finetune")}


def strategy(arm: str, clients_per_round: int | None = None) -> Strategy:
    """The strategy of a federated arm: the name of an entry, or a family with a value (`fedprox_0.05`).

    Raises ValueError with the known arms, or the values that a family takes.
    """
    family, _, value = arm.partition("_")
    if arm in STRATEGIES:
        known = STRATEGIES[arm]
    elif family in VALUES and re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", value):
        known = Strategy(**{VALUES[family]: float(value)})
        if not float(value) <= 100 or (family != "fedprox" and float(value) == 0):
            raise ValueError(f"{arm}: choose a value above 0 and at most 100, such as {family}_0.1")
    else:
        families = ", ".join(f"{name}_<value>" for name in VALUES)
        raise ValueError(f"{arm}: unknown federated arm; known are {', '.join(STRATEGIES)} and {families}")
    return replace(known, clients_per_round=clients_per_round)


def drawn(clients: Sequence[str], strategy: Strategy, seed: Sequence[int]) -> list[str]:
    """The clients of a round, in order: all, or `clients_per_round` drawn with `seed`."""
    n = strategy.clients_per_round
    if n is None or n >= len(clients):
        return list(clients)
    chosen = np.random.default_rng(list(seed)).choice(len(clients), n, replace=False)
    return [clients[k] for k in sorted(chosen)]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def own_keys(model: nn.Module, strategy: Strategy) -> set[str]:
    """Keys of the state dict that never leave a client."""
    if strategy.batch_norm not in ("own", "own statistics"):
        return set()
    keys = {f"{name}.{key}" for name, layer in batch_norms(model).items() for key in layer.state_dict()}
    return {key for key in keys if strategy.batch_norm == "own" or key.endswith(STATISTICS)}


def controls(model: nn.Module) -> State:
    """A SCAFFOLD control variate of zeros: one tensor per parameter, with the prefix CONTROL."""
    return {CONTROL + name: torch.zeros_like(w, requires_grad=False) for name, w in model.named_parameters()}


class Correction:
    """SCAFFOLD's correction in a round: add c - c_k to the gradients of `w` and keep their mean."""

    def __init__(self, w: Sequence[nn.Parameter], c: State, c_k: State):
        self.w, self.names, self.steps = w, list(c_k), 0
        self.offset = torch._foreach_sub([c[name] for name in c_k], list(c_k.values()))
        self.total = [torch.zeros_like(part) for part in self.offset]

    def __call__(self) -> None:
        gradients = [p.grad for p in self.w]
        torch._foreach_add_(self.total, gradients)
        torch._foreach_add_(gradients, self.offset)
        self.steps += 1

    def mean(self) -> State:
        """The mean gradient of the steps so far, the client's next control variate."""
        return dict(zip(self.names, torch._foreach_div(self.total, self.steps), strict=True))


class Server:
    """What the server keeps between rounds besides the weights: FedAdam's moments, SCAFFOLD's variate c.

    `n_k`: training cases of all clients, whether or not they are in a round.
    """

    def __init__(self, model: nn.Module, strategy: Strategy, n_k: Mapping[str, int]):
        self.strategy, self.n = strategy, sum(n_k.values())
        self.parameters = [name for name, _ in model.named_parameters()]
        self.stays = own_keys(model, strategy)
        self.w_t: State = {}
        self.c = {} if strategy.scaffold is None else controls(model)
        self.moments: dict[str, State] = {"m": {}, "v": {}}

    def state_dict(self) -> dict[str, Any]:
        """The server's state; training resumes from it bit for bit."""
        return {"c": self.c, "moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.c = {key: value.to(self.c[key].device) for key, value in state["c"].items()}
        self.moments = state["moments"]

    def sends(self, w_t: State) -> State:
        """What each client receives at the start of a round at `w_t`: the shared weights, and c."""
        self.w_t = w_t
        return without(w_t, self.stays) | self.c

    def step(self, mean: State, n: int) -> State:
        """All next global weights, from the `mean`, Eq. (2), of the answers of clients with `n` cases."""
        w, how = without(mean, self.c), self.strategy
        self.c = {key: c + mean[key] * (n / self.n) if mean else c for key, c in self.c.items()}
        moving = [key for key in self.parameters if key in w]
        if how.scaffold not in (None, 1.0):
            w |= {key: self.w_t[key] + how.scaffold * (w[key] - self.w_t[key]) for key in moving}
        if how.adam is not None:
            w |= {key: self._adam(key, w[key] - self.w_t[key]) for key in moving}
        return self.w_t | w

    def _adam(self, key: str, d: torch.Tensor) -> torch.Tensor:
        first, second = self.moments["m"], self.moments["v"]
        m = first.get(key, torch.zeros_like(d)).to(d.device)
        v = second.get(key, torch.full_like(d, TAU**2)).to(d.device)
        first[key], second[key] = BETA1 * m + (1 - BETA1) * d, BETA2 * v + (1 - BETA2) * d**2
        return self.w_t[key] + self.strategy.adam * first[key] / (second[key].sqrt() + TAU)


def without(state: State, keys: Collection[str]) -> State:
    """A state dict without some keys."""
    return {key: value for key, value in state.items() if key not in keys}
