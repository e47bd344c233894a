"""Federated strategies by name, one entry each: what a client adds to its steps, what stays with it, and how
the server makes the next weights.

Notation: w_t are the global weights of round t, w_k those of client k after its local update, N_k its cases,
p_k = N_k / sum N_k, g a gradient of F_k, Eq. (1). Eq. (2) averages everywhere, so with p_k, also where a
reference averages clients alike. Local steps are AdamW's, as in the paper.
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
    """How clients learn together; the defaults are FedAvg, `mu` > 0 is FedProx.

    Departs from the paper where anything else is set. `adam` and `scaffold` are rates of the server, `ditto`
    the pull to the global model, `finetune` a rate in units of `lr`; `clients_per_round` clients are drawn
    for a round instead of all.
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
        """Whether every client is tested with a model of its own."""
        return self.batch_norm != "averaged" or self.ditto is not None or self.finetune is not None

    @property
    def trains_alone(self) -> bool:
        """Whether clients also train models that never travel: not offered across machines."""
        return self.ditto is not None or self.finetune is not None


STRATEGIES = {
    # w = sum p_k w_k, BatchNorm's statistics included. McMahan et al., AISTATS 2017
    "fedavg": Strategy(),
    # g + mu (w - w_t), Eq. (3). Li et al., MLSys 2020
    "fedprox_0.1": Strategy(mu=0.1),
    "fedprox_0.3": Strategy(mu=0.3),
    # BatchNorm, its weights and statistics, stays at the client. Li et al., ICLR 2021
    "fedbn": Strategy(batch_norm="own"),
    # an ablation: its statistics alone stay (Andreux et al., DART 2020), or are measured again on the
    # client's training cases with the averaged weights before each test
    "fedavg_bn_local": Strategy(batch_norm="own statistics"),
    "fedavg_bn_recomputed": Strategy(batch_norm="recomputed"),
    # m = b1 m + (1 - b1) d, v = b2 v + (1 - b2) d^2, w = w_t + rate m / (sqrt(v) + tau), with the mean update
    # d = sum p_k (w_k - w_t). Reddi et al., ICLR 2021, algorithm 2
    "fedadam": Strategy(adam=0.01),
    # g - c_k + c; then c_k' = mean of g over the round's steps, w = w_t + rate d, c' = c + sum p_k (c_k' -
    # c_k). Karimireddy et al., ICML 2020, algorithm 1: of plain SGD its option II is this mean. Under AdamW
    # the corrected gradient passes through the moments, as FedProx's does
    "scaffold": Strategy(scaffold=1.0),
    # beside FedAvg's w each client trains v_k by g(v_k) + lambda (v_k - w_t), with an AdamW of its own, and
    # is tested with it. Li et al., ICML 2021, algorithm 1
    "ditto_0.1": Strategy(ditto=0.1),
    # FedAvg's last round, then epochs at each client alone, at a rate of so many `lr`. Wang et al., 2019
    # (arXiv 1910.10252)
    "finetune": Strategy(finetune=0.1),
}
VALUES = {"fedprox": "mu", "fedadam": "adam"} | {name: name for name in ("scaffold", "ditto", "finetune")}


def strategy(arm: str, clients_per_round: int | None = None) -> Strategy:
    """The strategy of a federated arm: an entry's name, or a family's with a value, such as `fedprox_0.05`.

    Raises ValueError naming the known arms, or the values that a family takes.
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
    """The clients that train in a round, in their order: all, or `clients_per_round` drawn from `seed`."""
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
    """A control variate of SCAFFOLD, all 0: a tensor per parameter, under a prefix."""
    return {CONTROL + name: torch.zeros_like(w, requires_grad=False) for name, w in model.named_parameters()}


class Correction:
    """SCAFFOLD's change of the gradients of parameters `w` in a round, by c - c_k; notes their mean."""

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
        """The mean gradient of the steps so far: the client's next control variate."""
        return dict(zip(self.names, torch._foreach_div(self.total, self.steps), strict=True))


class Server:
    """What the server keeps between rounds beside the weights: FedAdam's moments, SCAFFOLD's variate c.

    `n_k`: training cases of all clients, also of those that are not in a round.
    """

    def __init__(self, model: nn.Module, strategy: Strategy, n_k: Mapping[str, int]):
        self.strategy, self.n = strategy, sum(n_k.values())
        self.parameters = [name for name, _ in model.named_parameters()]
        self.stays = own_keys(model, strategy)
        self.w_t: State = {}
        self.c = {} if strategy.scaffold is None else controls(model)
        self.moments: dict[str, State] = {"m": {}, "v": {}}

    def state_dict(self) -> dict[str, Any]:
        """All of it, from which training goes on bit for bit."""
        return {"c": self.c, "moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it back to `state`."""
        device = next(iter(self.c.values())).device if self.c else None
        self.c, self.moments = {key: value.to(device) for key, value in state["c"].items()}, state["moments"]

    def sends(self, w_t: State) -> State:
        """What every client gets at the start of a round at `w_t`: the weights that are shared, and c."""
        self.w_t = w_t
        return without(w_t, self.stays) | self.c

    def step(self, mean: State, n: int) -> State:
        """The next global weights, all, from the `mean`, Eq. (2), of answers of clients with `n` cases."""
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
