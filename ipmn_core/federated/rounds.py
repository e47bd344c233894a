"""Rounds: centralized, federated and local-only training, one Epoch after another.

The functions take the same arguments: a model, training and test cases by center (indices into the cases,
in the order of the centers), the settings, and the checkpoint to resume from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ipmn_core.federated import client
from ipmn_core.federated.client import Cases, DivergedError, Learner, Settings
from ipmn_core.federated.equations import State, weighted_average
from ipmn_core.federated.strategies import Server, Strategy, drawn


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch or round: number from 1, training loss, test probabilities (n_test, K).

    - `prob` is None if the round was not tested, or if a site was away or shares only its results by center.
    - `learners`: the training state of each client, which the next epoch changes.
    - `inner_products` (clients, clients) of the updates w_k - w_t, NaN for clients that were left out.
    - `left_out`: the reason for each of these.
    - `centers`: results that sites share instead of predictions, as (center, cases, accuracy, AUC).
    - `own`: with a personal strategy, the tensors of each client's model that replace the global ones.
    - `cross` (K, n_test, classes): in the last epoch of `local_only`, each model on the test cases of all.
    """

    number: int
    loss: float
    prob: np.ndarray | None
    learners: Mapping[str, Any]
    inner_products: np.ndarray | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    centers: list[tuple[str, int, float, float]] = field(default_factory=list)
    server: Server | None = None
    own: dict[str, State] = field(default_factory=dict)
    cross: np.ndarray | None = None


@dataclass(frozen=True)
class Update:
    """A client's answer in a round: weights w_k, training cases N_k and mean loss, or its `fault`."""

    client: str
    n_k: int = 0
    loss: float = float("nan")
    state: State | None = None
    fault: str = ""


def fit_centralized(
    model: nn.Module,
    train: dict[str, torch.Tensor],
    test: dict[str, torch.Tensor],
    cases: Cases,
    settings: Settings,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Epochs over the cases of all centers together, each followed by a test."""
    everyone = torch.cat(list(train.values())).sort().values
    learners = {"all": Learner("all centers", model, everyone, settings)}
    tested = torch.cat(list(test.values()))
    for epoch in range(restore(model, learners, checkpoint), settings.epochs + 1):
        loss = client.train_epoch(model, learners["all"], cases, settings, [*settings.seed, epoch, 0, 0])
        yield Epoch(epoch, loss, client.evaluate(model, tested, cases, settings), learners)


def fit_federated(
    model: nn.Module,
    train: dict[str, torch.Tensor],
    test: dict[str, torch.Tensor],
    cases: Cases,
    settings: Settings,
    strategy: Strategy,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Rounds of local updates and aggregation, each followed by a test of the global model at each center.

    Each client starts from the same global weights; the server averages the results, Eq. (2). A client that
    fails or sends an invalid update (`fault_of`) is `left_out` of the round, and the others' shares grow. A
    round without clients keeps the weights. With a personal strategy each client's own model is tested on its
    own cases, if any. Raises DivergedError if no round had a client.
    """
    learners = {name: Learner(name, model, indices, settings, strategy) for name, indices in train.items()}
    server = Server(model, strategy, {name: len(indices) for name, indices in train.items()})
    first = restore(model, learners, checkpoint, server)
    aggregated = first > 1
    for round_ in range(first, settings.epochs + 1):
        seed = [*settings.seed, round_]
        taking_part = drawn(list(learners), strategy, seed)
        w_global = server.sends(client.snapshot(model))
        updates = (  # each is in `model` until the next is computed
            _update(name, model, w_global, learner, cases, settings, strategy, [*seed, k])
            for k, (name, learner) in enumerate(learners.items())
            if name in taking_part
        )
        loss, products, left_out = aggregate(model, server, w_global, updates, list(learners))
        for name in left_out:
            learners[name].forget_moments()
        aggregated |= len(left_out) < len(taking_part)
        prob, own = _tested(model, learners, test, cases, settings, strategy)
        yield Epoch(round_, loss, prob, learners, products, left_out, server=server, own=own)
    if not aggregated:
        raise DivergedError(without_any_client(left_out))


def _update(name: str, model: nn.Module, w_global: State, learner: Learner, *how: Any) -> Update:
    try:
        loss, state = client.local_update(model, w_global, learner, *how)
    except Exception as error:  # one client's failure must not end the others' round
        return Update(name, fault=f"{type(error).__name__}: {error}")
    return Update(name, len(learner.indices), loss, state)


def _tested(
    model: nn.Module, learners: Mapping[str, Learner], test: Mapping[str, torch.Tensor], *how: Any
) -> tuple[np.ndarray | None, dict[str, State]]:
    """Probabilities, center by center, of the global model or of each client's own; and the own models."""
    cases, settings, strategy = how
    if not strategy.personal:
        prob = [client.evaluate(model, indices, cases, settings) for indices in test.values()]
        return (np.concatenate(prob) if prob else None), {}
    w, prob, own = client.snapshot(model), {}, {}
    for name, learner in learners.items():
        own[name] = client.personalize(model, learner, *how)
        if name in test:
            prob[name] = client.evaluate(model, test[name], cases, settings)
        model.load_state_dict(w)
    return np.concatenate([prob[name] for name in test]), own


def fit_finetuned(
    model: nn.Module,
    train: dict[str, torch.Tensor],
    test: dict[str, torch.Tensor],
    cases: Cases,
    settings: Settings,
    strategy: Strategy,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """FedAvg's rounds, not tested, then `finetune_epochs` in which each client trains alone.

    The rounds equal those of the arm `fedavg`, bit for bit. A client fine-tunes with new AdamW moments at
    `finetune` times `lr`, without a schedule, and is tested on its own cases. `settings.epochs` counts rounds
    and epochs.
    """
    rounds = settings.epochs - settings.finetune_epochs
    done = checkpoint["epoch"] if checkpoint else 0
    if done <= rounds:
        how = replace(strategy, finetune=None)
        yield from fit_federated(model, train, {}, cases, replace(settings, epochs=rounds), how, checkpoint)
        checkpoint = None
    slow = replace(settings, lr=strategy.finetune * settings.lr, lr_gamma=1.0)
    learners = {name: Learner(name, model, own, slow, strategy) for name, own in train.items()}
    first = max(restore(model, learners, checkpoint), rounds + 1)
    w, n_k = client.snapshot(model), [len(own) for own in train.values()]
    for epoch in range(first, settings.epochs + 1):
        losses = []
        for k, learner in enumerate(learners.values()):
            model.load_state_dict(learner.own)
            losses.append(client.train_epoch(model, learner, cases, slow, [*settings.seed, epoch, k, 0]))
            learner.own = client.snapshot(model)
        model.load_state_dict(w)
        prob, own = _tested(model, learners, test, cases, settings, strategy)
        yield Epoch(epoch, float(np.average(losses, weights=n_k)), prob, learners, own=own)


def fit_local_only(
    models: nn.ModuleList,
    train: dict[str, torch.Tensor],
    test: dict[str, torch.Tensor],
    cases: Cases,
    settings: Settings,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Epochs without a federation: each client trains its own model and is tested on its own cases, if any.

    The probabilities follow `test`, center by center. They come from several models, so compare them only
    within a center. The first epoch equals the local update of FedAvg's first round. After the last epoch
    every model is tested at every center (`cross`).
    """
    mine = dict(zip(train, models, strict=True))
    learners = {name: Learner(name, mine[name], indices, settings) for name, indices in train.items()}
    n_k = [len(indices) for indices in train.values()]
    for epoch in range(restore(models, learners, checkpoint), settings.epochs + 1):
        seed = [*settings.seed, epoch]
        losses = [
            client.train_epoch(mine[name], learner, cases, settings, [*seed, k, 0])
            for k, (name, learner) in enumerate(learners.items())
        ]
        prob = [client.evaluate(mine[name], indices, cases, settings) for name, indices in test.items()]
        loss, cross = float(np.average(losses, weights=n_k)), None
        if epoch == settings.epochs:
            of_all = ([client.evaluate(m, i, cases, settings) for i in test.values()] for m in mine.values())
            cross = np.stack([np.concatenate(of_one) for of_one in of_all])
        yield Epoch(epoch, loss, np.concatenate(prob), learners, cross=cross)


def checkpoint_of(model: nn.Module, epoch: Epoch) -> dict[str, Any]:
    """The state after `epoch`, as tensors and plain values; training resumes from it bit for bit."""
    learners = {name: learner.state_dict() for name, learner in epoch.learners.items()}
    server = epoch.server and epoch.server.state_dict()
    return {"epoch": epoch.number, "model": model.state_dict(), "learners": learners, "server": server}


def restore(
    model: nn.Module,
    learners: Mapping[str, Any],
    checkpoint: dict[str, Any] | None,
    server: Server | None = None,
) -> int:
    """Restore model, learners and server from a checkpoint; return the number of the next epoch."""
    if checkpoint is None:
        return 1
    model.load_state_dict(checkpoint["model"])
    for name, state in checkpoint["learners"].items():
        learners[name].load_state_dict(state)
    if server:
        server.load_state_dict(checkpoint["server"])
    return checkpoint["epoch"] + 1


def aggregate(
    model: nn.Module, server: Server, w_global: State, updates: Iterable[Update], clients: Sequence[str]
) -> tuple[float, np.ndarray, dict[str, str]]:
    """Load the server's next weights, made from the average of the updates, Eq. (2), into `model`.

    Returns the training loss, the inner products (K, K) of the updates w_k - w_t, parameters only, and the
    reason for each client that was left out. `w_global` is what the server sent. `updates` are consumed one
    at a time, in the order of `clients`. Without a valid update (`fault_of`) the weights stay the same.
    """
    parameters = [name for name in server.parameters if name in w_global]
    n_k, losses, drifts, left_out = [], [], {}, {}

    def states() -> Iterator[State]:
        for update in updates:
            fault = update.fault or fault_of(update.state, w_global)
            if fault:
                left_out[update.client] = fault
                continue
            n_k.append(update.n_k)
            losses.append(update.loss)
            # in half precision, because all are kept until the round ends; a cosine keeps 3 decimals
            drift = [(update.state[name].detach() - w_global[name]).half() for name in parameters]
            drifts[update.client] = torch.cat([part.flatten() for part in drift])
            yield update.state

    mean = weighted_average(states(), n_k)
    model.load_state_dict(server.step(mean, sum(n_k)))
    loss = float(np.average(losses, weights=n_k)) if n_k else float("nan")
    return loss, inner_products([drifts.get(name) for name in clients]), left_out


def fault_of(state: State, w_global: State) -> str:
    """Why a client's `state` cannot be averaged with the others' that started at `w_global`; "" if it can."""
    for key, value in w_global.items():
        if key not in state:
            return f"its update lacks {key}"
        if (state[key].shape, state[key].dtype) != (value.shape, value.dtype):
            return f"{key} has another shape or type than the global weights"
        if not state[key].isfinite().all():
            return f"{key} holds values that are NaN or infinite"
    unknown = state.keys() - w_global.keys()
    return f"its update has an unknown {min(unknown)}" if unknown else ""


def without_any_client(left_out: dict[str, str]) -> str:
    """The message for a federation in which no round had a client."""
    name, fault = next(iter(left_out.items()))
    return f"every client was left out of every round; {name}: {fault}"


def inner_products(updates: Sequence[torch.Tensor | None]) -> np.ndarray:
    """Inner products (K, K), float64, of K updates; the diagonal is the squared drift; NaN for None."""
    products = np.full((len(updates), len(updates)), np.nan)
    there = [k for k, update in enumerate(updates) if update is not None]
    pieces = zip(*(updates[k].split(2**16) for k in there), strict=True)  # pieces that fit the CPU's cache
    pieces = (torch.stack(piece).float() for piece in pieces)
    if there:
        products[np.ix_(there, there)] = sum((piece @ piece.T).double() for piece in pieces).cpu().numpy()
    return products
