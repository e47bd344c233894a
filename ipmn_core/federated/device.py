"""Device, mixed precision, threads and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ipmn_core import models
from ipmn_core.params import Params

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def device_of(p: Params) -> torch.device:
    """The device of a profile; `auto` is the first GPU, if any. Raises ValueError for an absent GPU."""
    n = torch.cuda.device_count()
    if p.device == "auto":
        return torch.device("cuda" if n else "cpu")
    device = torch.device(p.device)
    if device.type == "cuda" and (device.index or 0) >= n:
        text = f"device: {p.device} is set, but torch sees {n} GPU(s); set `device: auto` or `cpu`"
        raise ValueError(text)
    return device


def prepare(threads: int) -> None:
    """Set up this process for training: torch's `threads` (0: all cores) and memory that it keeps.

    By default glibc returns large freed blocks to the system, and each new tensor pays for its pages again:
    up to a third of a step. `release_memory` returns the kept memory.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run a block or a function on one torch thread, so that its bits do not depend on the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release_memory() -> None:
    """Return this process's freed memory to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: on a CPU, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ask = [getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return any(answer() for answer in ask)


def uses_bfloat16(p: Params, device: torch.device, model: str) -> bool:
    """Whether to train `model` under bfloat16 autocast: as set, or with `auto` where it is faster.

    On a CPU, oneDNN computes depthwise convolutions more slowly in bfloat16. Raises ValueError if bfloat16 is
    set for a device without it.
    """
    able = has_bfloat16(device)
    if p.precision == "bfloat16" and not able:
        raise ValueError(
            f"precision: this {device.type} has no bfloat16 units, so bfloat16 would be slower; "
            "set `precision: float32` or `auto`"
        )
    pays = device.type == "cuda" or model not in models.DEPTHWISE
    return able and (p.precision == "bfloat16" or (p.precision == "auto" and pays))


class _Workarounds(TorchFunctionMode):
    """Keep type and layout in average pooling; pad short volumes explicitly under bfloat16.

    A CPU pools channels-last volumes into contiguous ones and, under autocast, into float32; all later
    concatenations of a DenseNet would do the same. oneDNN 3.12 (torch 2.13) silently returns wrong weight
    gradients for bfloat16 convolutions whose input has a side shorter than the kernel: 3x3x3 at 2x2x2
    voxels, which occurs in four of the networks at 32^3.
    """

    def __init__(self, bfloat16: bool):
        super().__init__()
        self.bfloat16 = bfloat16

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv3d and self.bfloat16 and min(args[0].shape[2:]) < max(args[1].shape[2:]):
            x, weight, bias, stride, padding, *rest = args  # as torch.nn.Conv3d calls it
            return func(
                F.pad(x, [n for n in reversed(padding) for _ in "ab"]), weight, bias, stride, 0, *rest
            )
        result = func(*args, **(kwargs or {}))
        if func is F.avg_pool3d:
            last = args[0].is_contiguous(memory_format=torch.channels_last_3d)
            layout = torch.channels_last_3d if last else torch.contiguous_format
            return result.to(args[0].dtype, memory_format=layout)
        return result


@contextlib.contextmanager
def autocast(device: torch.device, bfloat16: bool):
    """Run a forward pass with CPU workarounds, under `bfloat16` autocast if set."""
    lower = torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    with lower, _Workarounds(bfloat16):
        yield
