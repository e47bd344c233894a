"""Federated strategies by name, one entry each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Strategy:
    """How clients learn between aggregations: `mu` = 0 is FedAvg, `mu` > 0 is FedProx.

    Departs from the paper where set: `clients_per_round` clients are drawn for a round instead of all.
    """

    mu: float = 0.0
    clients_per_round: int | None = None


STRATEGIES = {
    "fedavg": Strategy(),  # McMahan et al. 2017
    "fedprox_0.1": Strategy(mu=0.1),  # Li et al. 2020
    "fedprox_0.3": Strategy(mu=0.3),
}


def strategy(arm: str, clients_per_round: int | None = None) -> Strategy:
    """The strategy of a federated arm. Raises ValueError naming the known arms."""
    if arm not in STRATEGIES:
        raise ValueError(f"{arm}: unknown federated arm; known are {', '.join(STRATEGIES)}")
    return replace(STRATEGIES[arm], clients_per_round=clients_per_round)


def drawn(clients: Sequence[str], strategy: Strategy, seed: Sequence[int]) -> list[str]:
    """The clients that train in a round, in their order: all, or `clients_per_round` drawn from `seed`."""
    n = strategy.clients_per_round
    if n is None or n >= len(clients):
        return list(clients)
    chosen = np.random.default_rng(list(seed)).choice(len(clients), n, replace=False)
    return [clients[k] for k in sorted(chosen)]
