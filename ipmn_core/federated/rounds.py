"""Federated learning in one process: local updates, aggregation, rounds. The paper's Eq. (2) and (3).

Eq. (1), the objective that each client minimises, is `training.local_objective`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ipmn_core.federated import privacy, training
from ipmn_core.federated.training import Cases, Epoch, Settings

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Strategy:
    """How clients learn between aggregations: `mu` = 0 is FedAvg, `mu` > 0 is FedProx.

    Departs from the paper where set: `clients_per_round` are drawn for a round, not all; each bounds its
    update to `clip_norm` and adds noise of `noise_multiplier` times that (`privacy`).
    """

    mu: float = 0.0
    clients_per_round: int | None = None
    clip_norm: float | None = None
    noise_multiplier: float | None = None


STRATEGIES = {
    "fedavg": Strategy(),  # McMahan et al. 2017
    "fedprox_0.1": Strategy(mu=0.1),  # Li et al. 2020
    "fedprox_0.3": Strategy(mu=0.3),
}


@dataclass(frozen=True)
class Update:
    """What a client returns in a round: its weights `state` (w_k), the number of its training cases (N_k) and
    its mean training loss; or else the `fault` that befell it.
    """

    client: str
    n_k: int = 0
    loss: float = float("nan")
    state: State | None = None
    fault: str = ""


def strategy(arm: str, **settings: Any) -> Strategy:
    """The strategy of a federated arm, other fields as given. Raises ValueError naming the known arms."""
    if arm not in STRATEGIES:
        raise ValueError(f"{arm}: unknown federated arm; known are {', '.join(STRATEGIES)}")
    return replace(STRATEGIES[arm], **settings)


def drawn(clients: Sequence[str], strategy: Strategy, seed: Sequence[int]) -> list[str]:
    """The clients that train in a round, in their order: all, or `clients_per_round` drawn from `seed`."""
    n = strategy.clients_per_round
    if n is None or n >= len(clients):
        return list(clients)
    chosen = np.random.default_rng(list(seed)).choice(len(clients), n, replace=False)
    return [clients[k] for k in sorted(chosen)]


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
        if state[key].dtype != value.dtype:
            return f"{key} has type {state[key].dtype}, not {value.dtype}"
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
    test: Sequence[torch.Tensor],
    data: Cases,
    settings: Settings,
    strategy: Strategy,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Rounds of local updates and aggregation, one Epoch each; `clients` maps a name to its case indices.

    In every round each client trains from the same global weights, Eq. (2) merges the results, and the
    global model is tested on `test`, center by center, as each would by itself. Clients are visited in the
    order given. A `checkpoint` is what an earlier Epoch's `checkpoint()` returned: training goes on after
    it, bit for bit.

    A client that fails, or whose update cannot be right (`fault_of`), is left out of its round, the others'
    shares grow, and the Epoch says so in `left_out`; a round without any client keeps the weights. Raises
    DivergedError at the end if that was so in every round.
    """
    learners = {name: training.Learner(name, model, indices, settings) for name, indices in clients.items()}
    names = list(learners)
    first = training.restore(model, learners, checkpoint)
    aggregated = first > 1
    for round_ in range(first, settings.epochs + 1):
        seed = [*settings.seed, round_]
        taking_part = drawn(names, strategy, seed)
        w_global = training.snapshot(model)
        updates = _local_updates(model, w_global, learners, taking_part, data, settings, strategy, seed)
        loss, products, left_out = aggregate(model, w_global, updates, names)
        for name in left_out:
            learners[name] = afresh(name, model, learners[name], settings)
        aggregated |= len(left_out) < len(taking_part)
        prob = np.concatenate([training.evaluate(model, cases, data, settings) for cases in test])
        state = training.checkpoint_of(model, learners, round_)
        yield Epoch(round_, loss, prob, state, products, left_out)
    if not aggregated:
        raise training.DivergedError(without_any_client(left_out))


def without_any_client(left_out: dict[str, str]) -> str:
    """Why a federation failed that never aggregated, in words."""
    name, fault = next(iter(left_out.items()))
    return f"every client was left out of every round; {name}: {fault}"


def _local_updates(
    model: nn.Module,
    w_global: State,
    learners: dict[str, training.Learner],
    taking_part: Sequence[str],
    data: Cases,
    settings: Settings,
    strategy: Strategy,
    seed: Sequence[int],
) -> Iterator[Update]:
    """One client's update after another, each in `model` until the next is asked for."""
    for k, (name, learner) in enumerate(learners.items()):
        if name not in taking_part:
            continue
        try:
            loss = local_update(model, w_global, learner, data, settings, strategy, [*seed, k])
            state = privacy.protected(model.state_dict(), w_global, strategy, [*seed, k])
            yield Update(name, len(learner.indices), loss, state)
        except Exception as error:  # whatever befalls one client must not end the others' round
            yield Update(name, fault=f"{type(error).__name__}: {error}")


def aggregate(
    model: nn.Module, w_global: State, updates: Iterable[Update], clients: Sequence[str]
) -> tuple[float, np.ndarray, dict[str, str]]:
    """Training loss, inner products (K, K) of the updates, who was left out and why; Eq. (2) is in `model`.

    `updates` are consumed one at a time, in the order of `clients`. Those that cannot be right (`fault_of`)
    are left out and the others' shares grow; without any, `model` holds `w_global`.
    """
    parameters = [name for name, _ in model.named_parameters()]
    n_k: list[int] = []
    losses: list[float] = []
    drifts: dict[str, torch.Tensor] = {}
    left_out: dict[str, str] = {}

    def states() -> Iterator[State]:
        for update in updates:
            fault = update.fault or fault_of(update.state, w_global)
            if fault:
                left_out[update.client] = fault
                continue
            n_k.append(update.n_k)
            losses.append(update.loss)
            drifts[update.client] = update_of(update.state, w_global, parameters)
            yield update.state

    try:
        w = weighted_average(states(), n_k)
    except ValueError:
        if n_k:
            raise
        w = w_global
    model.load_state_dict(w)
    loss = float(np.average(losses, weights=n_k)) if n_k else float("nan")
    return loss, inner_products([drifts.get(name) for name in clients]), left_out


def afresh(name: str, model: nn.Module, client: training.Learner, settings: Settings) -> training.Learner:
    """A client with new AdamW moments, for its own may be as wrong as its update, and its own schedule."""
    fresh = training.Learner(name, model, client.indices, settings)
    fresh.schedule.load_state_dict(client.schedule.state_dict())
    for group, old in zip(fresh.optimizer.param_groups, client.optimizer.param_groups, strict=True):
        group["lr"] = old["lr"]
    return fresh


def update_of(state: State, w_global: State, parameters: Sequence[str]) -> torch.Tensor:
    """A client's update w_k - w_t (P,), over the named parameters without the buffers, as in Eq. (3).

    In half precision, for all clients' are held until the round ends: 3 decimals of a drift or cosine remain.
    """
    return torch.cat([(state[name].detach() - w_global[name]).half().flatten() for name in parameters])


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
