"""Device, mixed precision, threads and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator

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
        raise ValueError(f"device: {p.device} is set, but torch sees {n} GPU(s); set `device: auto` or `cpu`")
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
        raise ValueError(f"precision: this {device.type} has no bfloat16 units; set `float32` or `auto`")
    pays = device.type == "cuda" or model not in models.DEPTHWISE
    return able and (p.precision == "bfloat16" or (p.precision == "auto" and pays))


class _Workarounds(TorchFunctionMode):
    """Keep type and layout in average pooling; replace three kinds of a CPU's convolutions.

    A CPU pools channels-last volumes into contiguous ones and, under autocast, into float32; all later
    concatenations of a DenseNet would do the same. oneDNN 3.12 (torch 2.13) silently returns wrong weight
    gradients for bfloat16 convolutions whose input has a side shorter than the kernel: 3x3x3 at 2x2x2
    voxels, which occurs in four of the networks at 32^3. It is slow in the first layer, whose input has
    one channel (`_by_slices`), and in the gradients of depthwise layers (`_depthwise`).
    """

    def __init__(self, bfloat16: bool, channels_last: bool):
        super().__init__()
        self.bfloat16, self.channels_last = bfloat16, channels_last

    def __torch_function__(self, func, types, args=(), kwargs=None):
        as_layer = func is F.conv3d and len(args) == 7 and isinstance(args[4], tuple)  # as nn.Conv3d calls it
        if as_layer and args[0].device.type == "cpu":
            func = self._convolution(*args)
        result = func(*args, **(kwargs or {}))
        if func is F.avg_pool3d:
            last = args[0].is_contiguous(memory_format=torch.channels_last_3d)
            layout = torch.channels_last_3d if last else torch.contiguous_format
            return result.to(args[0].dtype, memory_format=layout)
        return result

    def _convolution(self, x, weight, bias, stride, padding, dilation, groups) -> Callable[..., torch.Tensor]:
        """The form of F.conv3d that is right and fast for these arguments."""
        plain = dilation == (1, 1, 1)
        if self.bfloat16:
            if self.channels_last and plain and groups == 1 and x.shape[1] <= 2:  # a cube, or two fused
                return _by_slices
            return _padded if min(x.shape[2:]) < max(weight.shape[2:]) else F.conv3d
        single = plain and bias is None and len(weight) == x.shape[1] == groups > 1
        return _depthwise if single and torch.is_grad_enabled() else F.conv3d


def _pad(x: torch.Tensor, padding: tuple[int, int, int]) -> torch.Tensor:
    return F.pad(x, [n for n in reversed(padding) for _ in "ab"])


def _padded(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    return F.conv3d(_pad(x, padding), weight, bias, stride, 0, dilation, groups)


def _by_slices(x, weight, bias, stride, padding, *_) -> torch.Tensor:
    """A 3D convolution as a 2D one, channels-last, in bfloat16.

    The slices under the kernel's depth k become C x k channels; oneDNN is slow if there is one (see
    docs/performance.md).
    """
    x = _pad(x.bfloat16(), padding)
    slices = x.unfold(2, weight.shape[2], stride[0])  # (N, C, D', H, W, k)
    n, c, depth, h, w, k = slices.shape
    slices = slices.permute(0, 2, 3, 4, 1, 5).reshape(n * depth, h, w, c * k).permute(0, 3, 1, 2)
    y = F.conv2d(slices, weight.flatten(1, 2), bias, stride[1:])
    return y.contiguous(memory_format=torch.channels_last).unflatten(0, (n, depth)).transpose(1, 2)


def _depthwise(x, weight, _, stride, padding, *rest) -> torch.Tensor:
    """A depthwise convolution as a product, if one voxel is asked, or as 2D ones, if 3x3x3 at stride 1.

    The gradients of oneDNN's own are slow (see docs/performance.md).
    """
    one = all(n + 2 * more == k for n, more, k in zip(x.shape[2:], padding, weight.shape[2:], strict=True))
    if not one and (weight.shape[2:], stride) != ((3, 3, 3), (1, 1, 1)):
        return F.conv3d(x, weight, None, stride, padding, *rest)
    x = _pad(x, padding)
    if one:
        return (x * weight[:, 0]).sum((2, 3, 4), keepdim=True)
    n, _, depth = x.shape[:3]
    slices, kernels = x.transpose(1, 2).flatten(0, 1), weight.unbind(2)
    each = [F.conv2d(slices, kernel, groups=len(kernel)).unflatten(0, (n, depth)) for kernel in kernels]
    return sum(y[:, k : depth - 2 + k] for k, y in enumerate(each)).transpose(1, 2)


@contextlib.contextmanager
def autocast(device: torch.device, bfloat16: bool, channels_last: bool = False):
    """Run a forward pass with workarounds, under `bfloat16` autocast if set."""
    lower = torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    with lower, _Workarounds(bfloat16, channels_last):
        yield
