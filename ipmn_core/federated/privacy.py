"""What a client may do to its update before it leaves: bound it and add noise; and what that buys, epsilon.

Departs from the paper, which sends updates as they are. Everything here is off unless a profile sets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ipmn_core.federated.rounds import State, Strategy
    from ipmn_core.params import Params

DELTA = 1e-5  # the probability with which the bound epsilon may fail


def protected(state: State, w_global: State, strategy: Strategy, seed: Sequence[int]) -> State:
    """`state` with its update w_k - w_t bounded to the norm `clip_norm`, and noise added as `strategy` says.

    The update is that of every floating entry, BatchNorm's buffers included, for they are statistics of the
    cases, too. Noise is Gaussian, its standard deviation `noise_multiplier` x `clip_norm` in every entry
    (McMahan et al. 2018, added by the client itself). Variances are kept above zero. The same `state` comes
    back if neither is set.
    """
    if strategy.clip_norm is None:
        return state
    drifts = {k: v.float() - w_global[k].float() for k, v in state.items() if v.is_floating_point()}
    norm = torch.stack([drift.double().square().sum() for drift in drifts.values()]).sum().sqrt().item()
    share = 1.0 if norm <= strategy.clip_norm else strategy.clip_norm / norm  # of NaN all is NaN, and refused
    scale = (strategy.noise_multiplier or 0.0) * strategy.clip_norm
    rng = np.random.default_rng(list(seed))  # torch's generator has but 2^32 seeds: all can be tried
    left = {}
    for key, value in state.items():
        if key not in drifts:
            left[key] = value
            continue
        noise = 0.0
        if scale:
            noise = torch.from_numpy(rng.standard_normal(value.shape, np.float32)).to(value.device) * scale
        w = w_global[key].float() + drifts[key] * share + noise
        left[key] = (w.clamp_min(1e-5) if key.endswith("running_var") else w).to(value.dtype)
    return left


def epsilon(noise_multiplier: float | None, rounds: int, delta: float = DELTA) -> float:
    """The epsilon of `rounds` noised updates of one client, for `delta`; infinite without noise.

    Whoever sees the updates can tell a client's data from any other data it might have had no better than
    this. The unit is all data of a client, not a patient: two updates of norm C may lie 2 C apart, so the
    Gaussian mechanism has half the multiplier. Taking part is no secret, so drawing clients buys nothing.
    By Opacus' RDP accountant (Mironov 2017). Raises RuntimeError if Opacus is not installed.
    """
    if not noise_multiplier:
        return float("inf")
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise RuntimeError("epsilon is Opacus' to compute: `pip install 'ipmn[privacy]'`") from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier / 2, 1.0, rounds)]
    return float(accountant.get_epsilon(delta))


def note(p: Params) -> str:
    """What a profile's noise buys each client, in words; "" without noise. Raises as `epsilon`."""
    if p.noise_multiplier is None:
        return ""
    bound = epsilon(p.noise_multiplier, p.rounds)
    return (
        f"epsilon {bound:.3g} at delta {DELTA:g} for all data of a client, over the {p.rounds} rounds of one "
        "run, by its weights alone: losses, counts and scores are told without noise, and each further run "
        "adds its own"
    )
