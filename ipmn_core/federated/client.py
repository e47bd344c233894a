"""One client: local update, training epoch, evaluation. Centralized training is a single client."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ipmn_core.federated import device, strategies
from ipmn_core.federated.equations import State, add_proximal_gradient, local_objective
from ipmn_core.federated.strategies import CONTROL, Strategy


class DivergedError(ArithmeticError):
    """The training loss is no longer a number."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of training. `epochs` also counts rounds; what the machine decides is not compared."""

    epochs: int
    local_epochs: int
    batch_size: int
    batches_per_epoch: int | None
    lr: float
    weight_decay: float
    lr_step: int
    lr_gamma: float
    augment_prob: float
    seed: tuple[int, ...]
    finetune_epochs: int = 0
    bfloat16: bool = field(default=False, compare=False)
    channels_last: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Cases:
    """All cases of one modality on one device: cubes `x` (N, 1, S, S, S), labels `y` (N,)."""

    x: torch.Tensor
    y: torch.Tensor


def check_n_train(n_train: Mapping[str, int], where: str = "") -> None:
    """Raise ValueError naming clients with fewer than 2 training cases, which BatchNorm needs."""
    few = ", ".join(f"{name} ({n})" for name, n in n_train.items() if n < 2)
    if few:
        remedy = "use more folds, which leave more cases to train on, or leave the center out"
        raise ValueError(f"fewer than 2 training cases{where}: {few}; {remedy}")


class Learner:
    """The training state of one client: case indices, AdamW moments, learning-rate schedule.

    `own` stays at the client between rounds: BatchNorm's tensors (FedBN), the control variate (SCAFFOLD) or a
    whole model (fine-tuning; Ditto, with a `personal` learner). Raises ValueError as `check_n_train`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        indices: torch.Tensor,
        settings: Settings,
        strategy: Strategy | None = None,
    ):
        check_n_train({name: len(indices)})
        self.indices = indices
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, settings.lr_step, settings.lr_gamma)
        self.own: State = {}
        self.personal: Learner | None = None
        if strategy and strategy.trains_alone:
            self.own = snapshot(model)
            self.personal = None if strategy.ditto is None else Learner(name, model, indices, settings)
        elif strategy and strategy.scaffold is not None:
            self.own = strategies.controls(model)
        elif strategy and (keys := strategies.own_keys(model, strategy)):
            self.own = {key: value for key, value in snapshot(model).items() if key in keys}

    def state_dict(self) -> dict[str, Any]:
        """AdamW, schedule and `own`; training resumes from it bit for bit."""
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        personal = self.personal and self.personal.state_dict()
        return state | {"own": self.own, "personal": personal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        where = self.optimizer.param_groups[0]["params"][0].device
        self.own = {key: value.to(where) for key, value in state["own"].items()}
        if self.personal:
            self.personal.load_state_dict(state["personal"])

    def forget_moments(self) -> None:
        """Discard AdamW's moments, which may be bad after a refused update; the schedule goes on."""
        self.optimizer.state.clear()
        if self.personal:
            self.personal.forget_moments()


def local_update(
    model: nn.Module,
    w_global: State,
    client: Learner,
    cases: Cases,
    settings: Settings,
    strategy: Strategy,
    seed: Sequence[int],
) -> tuple[float, State]:
    """One client's round: start at `w_global` and minimize Eq. (1) for `local_epochs`, as the strategy says.

    Leaves the client's weights in `model`. Returns the mean training loss (without a proximal term) and what
    the client sends: the shared weights and the change of its control variate. Raises DivergedError.
    """
    w_global = {key: value.to(cases.y.device) for key, value in w_global.items()}
    if strategy.ditto is not None:
        model.load_state_dict(client.own)
        pull = _pull(model, w_global, strategy.ditto)
        _epochs(model, client.personal, cases, settings, seed, pull)
        client.own = _finite(snapshot(model))
    c = {key: value for key, value in w_global.items() if key.startswith(CONTROL)}
    stays = strategies.own_keys(model, strategy)
    model.load_state_dict(strategies.without(w_global, c) | {key: client.own[key] for key in stays})
    add_gradient = _pull(model, w_global, strategy.mu)
    if c:
        add_gradient = strategies.Correction(list(model.parameters()), c, client.own)
    loss = _epochs(model, client, cases, settings, seed, add_gradient)
    answer = model.state_dict()
    if stays:
        client.own = _finite({key: answer[key].clone() for key in stays})
    if c:
        mean = _finite(add_gradient.mean())
        answer |= {key: mean[key] - client.own[key] for key in mean}
        client.own = mean
    return loss, strategies.without(answer, stays)


def _finite(own: State) -> State:
    """Return what a client keeps. Raises DivergedError for NaN, which would spoil all later rounds."""
    if bad := next((key for key, value in own.items() if not value.isfinite().all()), None):
        raise DivergedError(f"{bad} holds values that are NaN or infinite; lower `lr`")
    return own


def _pull(model: nn.Module, w_t: State, weight: float) -> Callable[[], None] | None:
    """A function that adds `weight` (w - w_t) to the gradients; None for 0."""
    if weight == 0:
        return None
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    start = [w_t[name] if name in w_t else p.detach().clone() for name, p in named]
    return partial(add_proximal_gradient, [p for _, p in named], start, weight)


def _epochs(
    model: nn.Module,
    client: Learner,
    cases: Cases,
    settings: Settings,
    seed: Sequence[int],
    add_gradient: Callable[[], None] | None,
) -> float:
    losses = [
        train_epoch(model, client, cases, settings, [*seed, epoch], add_gradient)
        for epoch in range(settings.local_epochs)
    ]
    return sum(losses) / len(losses)


def personalize(
    model: nn.Module, client: Learner, cases: Cases, settings: Settings, strategy: Strategy
) -> State:
    """Turn the global weights in `model` into the client's own model; return the replaced tensors."""
    if strategy.batch_norm == "recomputed":
        return _recompute(model, client.indices, cases, settings)
    model.load_state_dict(client.own, strict=False)
    return client.own


@torch.no_grad()
def _recompute(model: nn.Module, indices: torch.Tensor, cases: Cases, settings: Settings) -> State:
    """Set BatchNorm's statistics to the mean over batches of the cases at `indices`; return them.

    torch's `update_bn` would leave dropout active.
    """
    layers, order = strategies.batch_norms(model), indices.to(cases.y.device)
    pieces = batches(model, cases, len(order), settings.batch_size)
    momentum = {name: layer.momentum for name, layer in layers.items()}
    model.eval()
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    for piece in pieces:
        forward(model, cases.x[order[piece]].float(), settings)
    for name, layer in layers.items():
        layer.momentum = momentum[name]
    keys = {f"{name}.{key}" for name in layers for key in strategies.STATISTICS}
    return {key: value for key, value in snapshot(model).items() if key in keys}


def train_epoch(
    model: nn.Module,
    learner: Learner,
    cases: Cases,
    settings: Settings,
    seed: Sequence[int],
    add_gradient: Callable[[], None] | None = None,
) -> float:
    """Train one pass over the learner's cases, in an order drawn from `seed`; return the mean training loss.

    `add_gradient` may change the gradients before each step (FedProx). Departs from the paper: a pass ends
    after `batches_per_epoch` batches, if set. Raises DivergedError if the loss is not finite.
    """
    model.train()
    rng = seeded(seed)
    order = learner.indices[torch.randperm(len(learner.indices), generator=rng)]
    axes, quarters = draw_augmentations(len(order), settings.augment_prob, rng)
    order = order.to(cases.y.device)  # once, so that a GPU never waits for the host
    total = torch.zeros((), device=cases.y.device)
    seen = 0
    for batch in batches(model, cases, len(order), settings.batch_size)[: settings.batches_per_epoch]:
        x = augmented(cases.x[order[batch]], axes[batch], quarters[batch]).float()
        loss = local_objective(forward(model, x, settings), cases.y[order[batch]])
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if add_gradient is not None:
            add_gradient()
        learner.optimizer.step()
        total += loss.detach() * len(x)
        seen += len(x)
    learner.schedule.step()
    learner.optimizer.zero_grad(set_to_none=True)  # free the gradients' memory until the next epoch
    loss = total.item() / seen
    if not np.isfinite(loss):
        raise DivergedError(f"the training loss became {loss}; lower `lr`, or set `precision: float32`")
    return loss


@torch.inference_mode()
def evaluate(model: nn.Module, indices: torch.Tensor, cases: Cases, settings: Settings) -> np.ndarray:
    """Class probabilities (n, K), float64, of the cases at `indices`."""
    model.eval()
    most = max(2 * settings.batch_size, 2**19 // cases.x[0].numel())  # more cases fit without gradients
    some = indices if len(indices) else torch.zeros(1, dtype=torch.long)  # some networks refuse empty batches
    pieces = some.to(cases.y.device).split(most)
    prob = [forward(model, cases.x[piece].float(), settings).softmax(1) for piece in pieces]
    return torch.cat(prob)[: len(indices)].double().cpu().numpy()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def forward(model: nn.Module, x: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Logits (N, K) in float32 of cubes (N, 1, S, S, S), under bfloat16 autocast if set."""
    if settings.channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with device.autocast(x.device, settings.bfloat16, settings.channels_last):
        return model(x).float()


def seeded(seed: Sequence[int]) -> torch.Generator:
    """A CPU generator for `seed`; also seeds the global generator, which dropout uses.

    Every epoch of every client has its own seed, so resuming needs no saved generator state.
    """
    words = np.random.SeedSequence(list(seed)).generate_state(2)
    # without a GPU torch.manual_seed records the whole call stack three times, which is slow
    seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_all(int(words[0]))
    return torch.Generator().manual_seed(int(words[1]))


def batches(model: nn.Module, cases: Cases, n: int, size: int) -> list[slice]:
    """Slices of `size` over `n` cases.

    Departs from the paper: a last batch of one case joins the batch before if the model cannot train on one.
    """
    ends = [*range(size, n, size), n]
    if len(ends) > 1 and n - ends[-2] == 1 and not trains_on_one(model, cases.x):
        del ends[-2]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def trains_on_one(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether `model` can train on a batch of one cube of `x` (N, 1, S, S, S).

    BatchNorm cannot if a feature map has only one voxel, as in DenseNet-121 at 32^3.
    """
    try:
        copy.deepcopy(model).to("meta").train()(x[:1].to("meta", torch.float32))
    except ValueError:
        return False
    return True


def draw_augmentations(n: int, prob: float, rng: torch.Generator) -> tuple[list[int], list[int]]:
    """The axis along which each of `n` cubes is flipped (1 to 3; 0: none), and its quarter turns (0 to 3).

    Each happens with probability `prob`: MONAI's RandAxisFlip and RandRotate90, as in the released code.
    """
    flips, turns = torch.rand(2, n, generator=rng) < prob
    axes = torch.randint(1, 4, (n,), generator=rng)
    quarters = torch.randint(1, 4, (n,), generator=rng)
    return (axes * flips).tolist(), (quarters * turns).tolist()


def augmented(x: torch.Tensor, axes: Sequence[int], quarters: Sequence[int]) -> torch.Tensor:
    """Flip each cube of `x` (N, 1, S, S, S) along its axis, then turn it in the first plane; in place."""
    for cube, axis, n in zip(x, axes, quarters, strict=True):
        if axis:
            cube.copy_(cube.flip(axis))
        if n:
            cube.copy_(cube.rot90(n, (1, 2)))
    return x
