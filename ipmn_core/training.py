"""One epoch, one evaluation, one centralized fit: what a center, or all of them together, does alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class DivergedError(ArithmeticError):
    """The training loss is no longer a number."""


@dataclass(frozen=True)
class Settings:
    """The protocol of one run: what of `params.Params` reaches a step. `epochs` counts rounds, too."""

    epochs: int
    local_epochs: int
    batch_size: int
    batches_per_epoch: int | None
    lr: float
    weight_decay: float
    lr_step: int
    lr_gamma: float
    augment_prob: float
    bfloat16: bool
    channels_last: bool
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Cases:
    """All cases of one modality on one device: cubes `x` (N, 1, S, S, S) in [0, 1], labels `y` (N,)."""

    x: torch.Tensor
    y: torch.Tensor


class Learner:
    """Whoever trains: its case indices, and the AdamW and schedule it keeps from epoch to epoch.

    Raises ValueError naming it if it has fewer than two cases: BatchNorm needs two to normalise over.
    """

    def __init__(self, name: str, model: nn.Module, indices: torch.Tensor, settings: Settings):
        if len(indices) < 2:
            raise ValueError(
                f"{name}: {len(indices)} training case(s), at least 2 are needed (BatchNorm fails on one); "
                "take fewer folds, or leave the center out"
            )
        self.indices = indices
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, settings.lr_step, settings.lr_gamma)


@dataclass(frozen=True)
class Epoch:
    """What an epoch (a round) leaves: its number from 1, training loss, test probabilities (n_test, K).

    `checkpoint()` gives the state from which training goes on bit for bit. A federated round also has the
    inner products (clients, clients) of the clients' updates w_k - w_t, over all parameters.
    """

    number: int
    loss: float
    prob: np.ndarray
    checkpoint: Callable[[], dict[str, Any]]
    inner_products: np.ndarray | None = None


def fit(
    model: nn.Module,
    train: torch.Tensor,
    test: torch.Tensor,
    data: Cases,
    settings: Settings,
    checkpoint: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Epochs of centralized training on the case indices `train`, each tested on `test`."""
    learners = {"all": Learner("all centers", model, train, settings)}
    for epoch in range(restore(model, learners, checkpoint), settings.epochs + 1):
        loss = train_epoch(model, learners["all"], data, settings, [*settings.seed, epoch, 0, 0])
        prob = evaluate(model, test, data, settings)
        yield Epoch(epoch, loss, prob, checkpoint_of(model, learners, epoch))


def local_objective(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Eq. (1): F_k(w) = 1/N_k sum_i l(f(x_i; w), y_i), cross-entropy of logits (N, K) and labels (N,).

    Over all cases of center k, or over a batch of them, whose gradient estimates it.
    """
    return F.cross_entropy(logits, y)


def train_epoch(
    model: nn.Module,
    learner: Learner,
    data: Cases,
    settings: Settings,
    seed: Sequence[int],
    add_gradient: Callable[[], None] | None = None,
) -> float:
    """Mean training loss of one pass over the learner's cases, in an order drawn from `seed`.

    Cross-entropy, one AdamW step a batch, one schedule step an epoch. Departs from the paper, for the demo:
    with `batches_per_epoch` a pass ends after so many batches. `add_gradient` may add to the
    gradients before each step (FedProx). Raises DivergedError if the loss is not finite.
    """
    model.train()
    rng = seeded(seed)
    order = learner.indices[torch.randperm(len(learner.indices), generator=rng)]
    total = torch.zeros((), device=data.y.device)
    seen = 0
    for batch in batches(order, settings.batch_size)[: settings.batches_per_epoch]:
        x = augment(data.x[batch].float(), settings.augment_prob, rng)
        loss = local_objective(forward(model, x, settings), data.y[batch])
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if add_gradient is not None:
            add_gradient()
        learner.optimizer.step()
        total += loss.detach() * len(batch)
        seen += len(batch)
    learner.schedule.step()
    learner.optimizer.zero_grad(set_to_none=True)  # the gradients' memory is free until the next epoch
    loss = total.item() / seen
    if not np.isfinite(loss):
        raise DivergedError(f"the training loss became {loss}; lower `lr`, or set `precision: float32`")
    return loss


@torch.inference_mode()
def evaluate(model: nn.Module, indices: torch.Tensor, data: Cases, settings: Settings) -> np.ndarray:
    """Class probabilities (n, K), float64, of the cases at `indices`."""
    model.eval()
    # no gradients are kept, so more cases fit; below 16, torch takes a slow path on one thread
    pieces = indices.split(max(16, 2 * settings.batch_size))
    prob = [forward(model, data.x[piece].float(), settings).softmax(1) for piece in pieces]
    return torch.cat(prob).double().cpu().numpy()


def checkpoint_of(
    model: nn.Module, learners: dict[str, Learner], number: int
) -> Callable[[], dict[str, Any]]:
    """A function for the state after epoch `number`: weights, every learner's AdamW and schedule."""

    def checkpoint() -> dict[str, Any]:
        states = {k: (s.optimizer.state_dict(), s.schedule.state_dict()) for k, s in learners.items()}
        return {"epoch": number, "model": model.state_dict(), "learners": states}

    return checkpoint


def restore(model: nn.Module, learners: dict[str, Learner], checkpoint: dict[str, Any] | None) -> int:
    """The number of the next epoch, after model and learners are put back as `checkpoint` left them."""
    if checkpoint is None:
        return 1
    model.load_state_dict(checkpoint["model"])
    for name, (optimizer, schedule) in checkpoint["learners"].items():
        learners[name].optimizer.load_state_dict(optimizer)
        learners[name].schedule.load_state_dict(schedule)
    return checkpoint["epoch"] + 1


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state dict that later training does not touch."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def forward(model: nn.Module, x: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Logits (N, K) in float32 of cubes (N, 1, S, S, S), under bfloat16 autocast if so set."""
    if settings.channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.bfloat16):
        return model(x).float()


def seeded(seed: Sequence[int]) -> torch.Generator:
    """A CPU generator for `seed`, a few whole numbers; dropout's global one is seeded alike.

    Every epoch of every client has its own seed, so nothing of a generator need be saved to resume.
    """
    words = np.random.SeedSequence(list(seed)).generate_state(2)
    torch.manual_seed(int(words[0]))
    return torch.Generator().manual_seed(int(words[1]))


def batches(order: torch.Tensor, size: int) -> list[torch.Tensor]:
    """`order` in pieces of `size`; a last piece of one joins the piece before it.

    Departs from the paper: its code is silent on a batch of one, on which BatchNorm fails at small sizes.
    """
    pieces = list(order.split(size))
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def augment(x: torch.Tensor, prob: float, rng: torch.Generator) -> torch.Tensor:
    """`x` (N, 1, S, S, S) with, each with probability `prob`, a random axis flipped and a random
    rotation by 90, 180 or 270 degrees in the first two axes: MONAI's RandAxisFlip and RandRotate90.
    """
    n = len(x)
    flip, rotate = torch.rand(2, n, generator=rng) < prob
    axis = torch.randint(3, (n,), generator=rng)
    turns = torch.randint(1, 4, (n,), generator=rng)
    for i in flip.nonzero().flatten().tolist():
        x[i] = x[i].flip(1 + int(axis[i]))
    for i in rotate.nonzero().flatten().tolist():
        x[i] = x[i].rot90(int(turns[i]), (1, 2))
    return x
