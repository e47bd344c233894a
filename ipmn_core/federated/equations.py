"""The paper's three equations as functions of plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

State = dict[str, torch.Tensor]  # a state dict: weights and buffers by name


def local_objective(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Eq. (1): F_k(w) = 1/N_k sum_i l(f(x_i; w), y_i), cross-entropy of logits (N, K) and labels (N,).

    Over all cases of center k, or over a batch, whose gradient is an estimate.
    """
    return F.cross_entropy(logits, y)


def weighted_average(states: Iterable[State], n_k: Iterable[int]) -> State:
    """Eq. (2): w = sum_k N_k w_k / sum_k N_k over the whole state dict, BatchNorm buffers included.

    Sums states one at a time, in client order, in float64, so the result does not depend on which process
    aggregates. Truncates integer buffers. Without states it is empty. Raises ValueError if the numbers of
    states and of cases differ, or if no state has a case.
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
    if sums and total <= 0:
        raise ValueError("aggregation needs at least one training case")
    return {key: (value / total).to(dtypes[key]) for key, value in sums.items()}


def add_proximal_gradient(w: Sequence[nn.Parameter], w_t: Sequence[torch.Tensor], mu: float) -> None:
    """Eq. (3): F_k(w) + mu/2 ||w - w_t||^2. Add the second term's gradient, mu (w - w_t), to that of `w`.

    In place, over all parameters; the closed form needs no graph. The proximal gradient then passes through
    AdamW's moments like any other, as in the released code.
    """
    # (w - w_t) is exactly 0 at w = w_t in float32; mu w - mu w_t is not
    drift = torch._foreach_sub([p.detach() for p in w], list(w_t))
    torch._foreach_add_([p.grad for p in w], drift, alpha=mu)
