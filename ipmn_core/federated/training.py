"""One epoch, one evaluation, one centralized fit: what a center, or all of them together, does alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ipmn_core.federated import machine


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
    inner products (clients, clients) of the clients' updates w_k - w_t, over all parameters, NaN for those
    `left_out`, a reason by client. `prob` is None for a round that could not be tested: a hospital was away,
    or shares no more than its own `centers`, tuples of center, cases, accuracy and AUC.
    """

    number: int
    loss: float
    prob: np.ndarray | None
    checkpoint: Callable[[], dict[str, Any]]
    inner_products: np.ndarray | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    centers: list[tuple[str, int, float, float]] = field(default_factory=list)


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
    turned = draw_orientations(len(order), data.x.shape[-1], settings.augment_prob, rng)
    device = data.y.device
    order, turned = order.to(device), turned.to(device)  # once: a GPU then never waits for the host
    total = torch.zeros((), device=device)
    seen = 0
    for batch in batches(len(order), settings.batch_size)[: settings.batches_per_epoch]:
        x = oriented(data.x[order[batch]], turned[batch]).float()
        loss = local_objective(forward(model, x, settings), data.y[order[batch]])
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if add_gradient is not None:
            add_gradient()
        learner.optimizer.step()
        total += loss.detach() * len(x)
        seen += len(x)
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
    most = max(2 * settings.batch_size, 2**19 // data.x[0].numel())  # no gradients are kept: more cases fit
    pieces = indices.to(data.y.device).split(most)
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
    with machine.autocast(x.device, settings.bfloat16):
        return model(x).float()


def seeded(seed: Sequence[int]) -> torch.Generator:
    """A CPU generator for `seed`, a few whole numbers; dropout's global one is seeded alike.

    Every epoch of every client has its own seed, so nothing of a generator need be saved to resume.
    """
    words = np.random.SeedSequence(list(seed)).generate_state(2)
    # without a GPU torch.manual_seed notes the whole call stack, three times, for GPUs that may yet appear
    seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_all(int(words[0]))
    return torch.Generator().manual_seed(int(words[1]))


def batches(n: int, size: int) -> list[slice]:
    """`n` cases in pieces of `size`; a last piece of one joins the piece before it.

    Departs from the paper: its code is silent on a batch of one, on which BatchNorm fails at small sizes.
    """
    ends = [*range(size, n, size), n]
    if len(ends) > 1 and n - ends[-2] == 1:
        del ends[-2]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def draw_orientations(n: int, size: int, prob: float, rng: torch.Generator) -> torch.Tensor:
    """How each of `n` cubes is augmented, (n, 4) int64: a row of `orientations`, drawn from `rng`.

    Each with probability `prob`, a random axis is flipped, and the first two axes are turned by 90, 180 or
    270 degrees: MONAI's RandAxisFlip and RandRotate90.
    """
    flips, turns = torch.rand(2, n, generator=rng) < prob
    axis = torch.randint(1, 4, (n,), generator=rng)
    quarters = torch.randint(1, 4, (n,), generator=rng)
    return orientations(size)[axis * flips, quarters * turns]


@functools.cache
def orientations(size: int) -> torch.Tensor:
    """Where a turned cube's voxels come from, (4, 4, 4): by flip (none, then axis 0 to 2) and quarter turns.

    It reads the flattened cube from another first voxel with other steps along the axes: four numbers.
    """
    voxels = torch.arange(size**3).view(size, size, size)
    cubes = [voxels, *(voxels.flip(axis) for axis in range(3))]
    read = [[cube.rot90(quarters, (0, 1)) for quarters in range(4)] for cube in cubes]
    first = lambda v: v[0, 0, 0]  # noqa: E731
    steps = lambda v: [first(v), v[1, 0, 0] - first(v), v[0, 1, 0] - first(v), v[0, 0, 1] - first(v)]  # noqa: E731
    return torch.tensor([[steps(v) for v in row] for row in read])


def oriented(x: torch.Tensor, orientation: torch.Tensor) -> torch.Tensor:
    """Cubes `x` (N, 1, S, S, S) read in their `orientation` (N, 4), by index arithmetic, on their device."""
    along = torch.arange(x.shape[-1], device=x.device)
    first, d, h, w = orientation.T[:, :, None, None, None]
    voxels = first + d * along[:, None, None] + h * along[:, None] + w * along
    return x.flatten(1).gather(1, voxels.flatten(1)).view_as(x)
