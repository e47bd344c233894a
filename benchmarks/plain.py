"""A plain MONAI pipeline without this package: the baseline of `bench.py` and the training tests.

Built as in MONAI's tutorials: every epoch reads, scales and resizes the files, in float32. FedProx uses a
deep copy of the global model and the norm through autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from monai.data import DataLoader, ImageDataset
from monai.transforms import (
    Compose,
    CropForeground,
    EnsureChannelFirst,
    LoadImage,
    RandAxisFlip,
    RandRotate90,
    Resize,
    ScaleIntensity,
)
from torch import nn
from torch.nn import functional as F

Batches = Iterable[Sequence[torch.Tensor]]


def loader(
    files: Sequence[str], labels: Sequence[int], size: int, batch_size: int, augment_prob: float, order=None
) -> DataLoader:
    """Batches of cubes (N, 1, S, S, S) and labels (N,) from files of clean ROIs, shuffled or in `order`."""
    transform = Compose(
        [
            ScaleIntensity(),
            EnsureChannelFirst(),
            Resize((size,) * 3, mode="area"),
            RandAxisFlip(augment_prob),
            RandRotate90(augment_prob),
        ]
    )
    dataset = ImageDataset(list(files), labels=list(labels), transform=transform)
    return DataLoader(dataset, num_workers=0, batch_size=batch_size, sampler=order, shuffle=order is None)


def cube(image: str, mask: str, size: int) -> torch.Tensor:
    """A scan's cube (1, S, S, S): image x mask, cropped, scaled, resized."""
    read = Compose([LoadImage(image_only=True), EnsureChannelFirst()])
    volume, organ = read(image), read(mask)
    stacked = torch.cat([volume * organ, organ])
    cropped = CropForeground(select_fn=lambda x: x > 0, channel_indices=[1], allow_smaller=True)(stacked)
    return Compose([ScaleIntensity(), Resize((size,) * 3, mode="area")])(cropped[:1])


def optimizer_of(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """The protocol's AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    mu: float = 0.0,
    w_global: nn.Module | None = None,
) -> None:
    """Train one pass over `batches`: cross-entropy, and if `mu` > 0 plus mu/2 ||w - w_global||^2, Eq. (3)."""
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        # as a plain tensor, because MONAI's metadata slow every operation
        loss = F.cross_entropy(model(x.as_tensor()), y)
        if mu > 0:
            pairs = zip(model.parameters(), w_global.parameters(), strict=True)
            loss = loss + mu / 2 * sum(((w - w_t.detach()) ** 2).sum() for w, w_t in pairs)
        loss.backward()
        optimizer.step()


def federated_round(
    model: nn.Module,
    clients: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batches],
    n_k: Sequence[int],
    mu: float = 0.0,
) -> None:
    """One round: every client starts at `model` and trains one epoch; Eq. (2) averages them into `model`."""
    for client, optimizer, of_client in zip(clients, optimizers, batches, strict=True):
        client.load_state_dict(model.state_dict())
        train_epoch(client, optimizer, of_client, mu, copy.deepcopy(model) if mu > 0 else None)
    states = [client.state_dict() for client in clients]
    average = {
        key: sum(n / sum(n_k) * state[key] for n, state in zip(n_k, states, strict=True)).to(value.dtype)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(average)
