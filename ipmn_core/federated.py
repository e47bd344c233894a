"""Federated learning in one process: local updates, aggregation, rounds. The paper's Eq. (2) and (3).

Eq. (1), the objective that each client minimises, is `training.local_objective`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ipmn_core import training
from ipmn_core.training import Cases, Epoch, Settings

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Strategy:
    """How clients learn between aggregations: `mu` = 0 is FedAvg, `mu` > 0 is FedProx."""

    mu: float = 0.0


STRATEGIES = {
    "fedavg": Strategy(),  # McMahan et al. 2017
    "fedprox_0.1": Strategy(mu=0.1),  # Li et al. 2020
    "fedprox_0.3": Strategy(mu=0.3),
}


def strategy(arm: str) -> Strategy:
    """The strategy of a federated arm. Raises ValueError naming the known arms."""
    if arm not in STRATEGIES:
        raise ValueError(f"{arm}: unknown federated arm; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[arm]


def weighted_average(states: Iterable[State], n_k: Iterable[int]) -> State:
    """Eq. (2): w = sum_k N_k w_k / sum_k N_k over the whole state dict, BatchNorm buffers included.

    States are consumed one at a time, in client order, and summed in float64, so the result depends
    neither on memory nor on who aggregates; integer buffers are rounded. Raises ValueError if the
    numbers of states and of cases differ, or if there are no cases.
    """
    total = 0
    sums: State = {}
    dtypes: dict[str, torch.dtype] = {}
    for state, n in zip(states, n_k, strict=True):
        total += n
        for key, value in state.items():
            dtypes[key] = value.dtype
            if key not in sums:
                sums[key] = torch.zeros_like(value, dtype=torch.float64)
            sums[key].add_(value, alpha=n)
    if total <= 0:
        raise ValueError("aggregation needs at least one training case")
    return {
        key: (value / total if dtypes[key].is_floating_point else (value / total).round()).to(dtypes[key])
        for key, value in sums.items()
    }


def fault_of(state: State, w_global: State) -> str:
    """Why a client's `state` cannot be aggregated with others that started at `w_global`; "" if it can."""
    for key, value in w_global.items():
        if key not in state:
            return f"its update lacks {key}"
        if state[key].shape != value.shape:
            return f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        if not state[key].isfinite().all():
            return f"{key} holds values that are NaN or infinite"
    unknown = state.keys() - w_global.keys()
    return f"its update has an unknown {min(unknown)}" if unknown else ""


def add_proximal_gradient(w: Sequence[nn.Parameter], w_t: Sequence[torch.Tensor], mu: float) -> None:
    """Eq. (3): F_k(w) + mu/2 ||w - w_t||^2. Adds the second term's gradient, mu (w - w_t), to that of `w`.

    In place, over all parameters; the closed form spares a graph over them. AdamW then scales it like any
    other gradient: the proximal pull passes through the adaptive moments, as in the released code.
    """
    drift = torch._foreach_sub(
        [p.detach() for p in w], list(w_t)
    )  # exactly 0 at w = w_t, unlike mu w - mu w_t
    torch._foreach_add_([p.grad for p in w], drift, alpha=mu)


def local_update(
    model: nn.Module,
    w_global: State,
    client: training.Learner,
    data: Cases,
    settings: Settings,
    strategy: Strategy,
    seed: Sequence[int],
) -> float:
    """One client's round: start at `w_global`, minimise Eq. (1) or Eq. (3) for `local_epochs` epochs.

    Leaves the client's weights in `model` and returns its mean training loss without the proximal term.
    The client keeps its own AdamW moments and learning-rate schedule across rounds.
    """
    model.load_state_dict(w_global)
    add_gradient = None
    if strategy.mu > 0:
        w = [p for p in model.parameters() if p.requires_grad]
        w_t = [p.detach().clone() for p in w]
        add_gradient = lambda: add_proximal_gradient(w, w_t, strategy.mu)  # noqa: E731
    losses = [
        training.train_epoch(model, client, data, settings, [*seed, epoch], add_gradient)
        for epoch in range(settings.local_epochs)
    ]
    return sum(losses) / len(losses)


def fit(
    model: nn.Module,
    clients: dict[str, torch.Tensor],
    test: torch.Tensor,
    data: Cases,
    settings: Settings,
    strategy: Strategy,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Rounds of local updates and aggregation, one Epoch each; `clients` maps a name to its case indices.

    In every round each client trains from the same global weights, Eq. (2) merges the results, and the
    global model is tested on `test`. Clients are visited in the order given. A `checkpoint` is what
    an earlier Epoch's `checkpoint()` returned: training goes on after it, bit for bit.

    A client that fails, or whose update cannot be right (`fault_of`), is left out of its round, the others'
    shares grow, and the Epoch says so in `left_out`; a round without any client keeps the weights. Raises
    DivergedError at the end if that was so in every round.
    """
    learners = {name: training.Learner(name, model, indices, settings) for name, indices in clients.items()}
    first = training.restore(model, learners, checkpoint)
    aggregated = first > 1
    for round_ in range(first, settings.epochs + 1):
        seed = [*settings.seed, round_]
        loss, products, left_out = _round(model, learners, data, settings, strategy, seed)
        aggregated |= len(left_out) < len(learners)
        prob = training.evaluate(model, test, data, settings)
        state = training.checkpoint_of(model, learners, round_)
        yield Epoch(round_, loss, prob, state, products, left_out)
    if not aggregated:
        name, fault = next(iter(left_out.items()))
        raise training.DivergedError(f"every client was left out of every round; {name}: {fault}")


def _round(
    model: nn.Module,
    clients: dict[str, training.Learner],
    data: Cases,
    settings: Settings,
    strategy: Strategy,
    seed: Sequence[int],
) -> tuple[float, np.ndarray, dict[str, str]]:
    """Training loss, inner products of the updates, who was left out; `model` then holds the aggregate."""
    w_global = training.snapshot(model)
    n_k: list[int] = []
    losses: list[float] = []
    updates: dict[str, torch.Tensor] = {}
    left_out: dict[str, str] = {}

    def local_states() -> Iterator[State]:
        for k, (name, client) in enumerate(clients.items()):
            try:
                loss = local_update(model, w_global, client, data, settings, strategy, [*seed, k])
                fault = fault_of(model.state_dict(), w_global)
            except Exception as error:  # whatever befalls one client must not end the others' round
                fault = f"{type(error).__name__}: {error}"
            if fault:
                left_out[name] = fault
                clients[name] = _afresh(name, model, client, settings)
                continue
            n_k.append(len(client.indices))
            losses.append(loss)
            updates[name] = update_of(model, w_global)
            yield model.state_dict()

    try:
        w = weighted_average(local_states(), n_k)
    except ValueError:
        if n_k:
            raise
        w = w_global
    model.load_state_dict(w)
    loss = float(np.average(losses, weights=n_k)) if n_k else float("nan")
    return loss, inner_products([updates.get(name) for name in clients]), left_out


def _afresh(name: str, model: nn.Module, client: training.Learner, settings: Settings) -> training.Learner:
    """A client with new AdamW moments, for its own may be as wrong as its update, and its own schedule."""
    fresh = training.Learner(name, model, client.indices, settings)
    fresh.schedule.load_state_dict(client.schedule.state_dict())
    for group, old in zip(fresh.optimizer.param_groups, client.optimizer.param_groups, strict=True):
        group["lr"] = old["lr"]
    return fresh


def update_of(model: nn.Module, w_global: State) -> torch.Tensor:
    """A client's update w_k - w_t (P,), over the P parameters without the buffers, as in Eq. (3).

    In half precision, for all clients' are held until the round ends: 3 decimals of a drift or cosine remain.
    """
    return torch.cat([(w.detach() - w_global[name]).half().flatten() for name, w in model.named_parameters()])


def inner_products(updates: Sequence[torch.Tensor | None]) -> np.ndarray:
    """Inner products (K, K), float64, of K updates: squared drift on the diagonal, cosines off it.

    NaN with an update that is None.
    """
    products = np.full((len(updates), len(updates)), np.nan)
    there = [k for k, update in enumerate(updates) if update is not None]
    pieces = zip(*(updates[k].split(2**16) for k in there), strict=True)  # these stay in the cache
    pieces = (torch.stack(piece).float() for piece in pieces)
    if there:
        products[np.ix_(there, there)] = sum((piece @ piece.T).double() for piece in pieces).cpu().numpy()
    return products


def fit_local_only(
    models: nn.ModuleDict,
    clients: dict[str, torch.Tensor],
    tests: dict[str, torch.Tensor],
    data: Cases,
    settings: Settings,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Epochs without a federation: every client trains a model of its own, and is tested on its own cases.

    What a center reaches alone, the yardstick of a federation's gain. `models`, `clients` and `tests` have
    the same names; the probabilities follow `tests`, one client after another, and are those of as many
    models: they share no scale, so compare them within a client only. Seeds are those of the
    federated clients, so the first epoch is the local update of FedAvg's first round.
    """
    learners = {name: training.Learner(name, models[name], clients[name], settings) for name in clients}
    first = training.restore(models, learners, checkpoint)
    n_k = [len(indices) for indices in clients.values()]
    for epoch in range(first, settings.epochs + 1):
        losses, probs = [], []
        for k, (name, learner) in enumerate(learners.items()):
            seed = [*settings.seed, epoch, k, 0]
            losses.append(training.train_epoch(models[name], learner, data, settings, seed))
            probs.append(training.evaluate(models[name], tests[name], data, settings))
        loss = float(np.average(losses, weights=n_k))
        yield Epoch(epoch, loss, np.concatenate(probs), training.checkpoint_of(models, learners, epoch))
