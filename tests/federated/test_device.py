import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ipmn_core import models
from ipmn_core.federated import device as devices
from ipmn_core.params import Params

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
# On a CPU without bfloat16 units, where training refuses it, ResNet-34 would take minutes.
SLOW = [name for name in models.MODELS if name != "resnet34" or devices.has_bfloat16(CPU)]
SLOW.remove("shufflenetv2")
NETWORKS = [(name, False, name in models.CHANNELS_LAST) for name in sorted(models.DEPTHWISE)]
NETWORKS += [("shufflenetv2", True, last) for last in (False, True)]
NETWORKS += [
    pytest.param(name, True, last, marks=pytest.mark.slow) for name in SLOW for last in (False, True)
]


def caught_convolutions(model):
    """A list that each convolution's next call joins with its input and output, which keep gradients."""
    caught = []

    def catch(layer, inputs, output):
        inputs[0].retain_grad()
        output.retain_grad()
        caught.append((layer, inputs[0], output))
        return output.clone()  # the activation after it may work in place

    for layer in model.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_pre_hook(lambda layer, inputs: inputs[0].clone())  # this layer's alone
            layer.register_forward_hook(catch)
    return caught


def steps(x):
    """The strides of all axes that have more than one place: the layout of a tensor in memory."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


# Under torch.autocast alone, oneDNN 3.12 (torch 2.13) fails this on a CPU with AVX512-BF16: weight gradients
# are off by 0.8 of their norm, or infinite, in 5 layers of ResNet-34, 24 of DenseNet-121 and, channels last,
# 3 each of ShuffleNet-V2 and MobileNet-V2.
@pytest.mark.parametrize(("name", "bfloat16", "channels_last"), NETWORKS)
def test_every_convolution_gives_the_gradients_of_float32_to_its_precision(name, bfloat16, channels_last):
    torch.manual_seed(0)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    model = models.build(name, 3).to(memory_format=layout)
    x = torch.rand(2, 1, 32, 32, 32).contiguous(memory_format=layout).requires_grad_()
    caught = caught_convolutions(model)
    with devices.autocast(CPU, bfloat16, channels_last):
        logits = model(x)
    F.cross_entropy(logits.float(), torch.tensor([0, 2])).backward()
    assert len(caught) == sum(isinstance(layer, nn.Conv3d) for layer in model.modules())
    for layer, x, y in caught:
        how = layer.stride, layer.padding, layer.dilation, layer.groups
        given, weight, gradient = x.detach().float(), layer.weight.detach(), y.grad.float()
        bias = None if layer.bias is None else layer.bias.detach()
        for mine, exact in (
            (y.detach(), F.conv3d(given, weight, bias, *how)),
            (layer.weight.grad, nn.grad.conv3d_weight(given, weight.shape, gradient, *how)),
            (x.grad, nn.grad.conv3d_input(given.shape, weight, gradient, *how)),
        ):
            # in bfloat16 every factor is rounded by up to 2^-9 of itself; the largest difference measured was
            # 0.004 by oneDNN on AVX512-BF16, 0.021 by torch's own kernels, which serve a CPU without it
            tolerance = 0.04 if bfloat16 else 1e-5  # float32: depthwise layers are computed in another form
            assert (mine.float() - exact).norm() <= tolerance * exact.norm(), (layer, tuple(x.shape))
        # on a CPU the fused AdamW pairs weight and gradient in memory order, ignoring their strides
        assert steps(layer.weight.grad) == steps(layer.weight) or layer.kernel_size == (1, 1, 1), layer


@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(1, 7, 2), (1, 7, 1), (2, 7, 2), (1, 3, (1, 2, 2))]
)
def test_a_first_layer_by_slices_is_the_convolution(channels, kernel, stride):
    layer = nn.Conv3d(channels, 8, kernel, stride, kernel // 2).to(memory_format=torch.channels_last_3d)
    x = torch.rand(3, channels, 9, 12, 11, requires_grad=True)
    with devices.autocast(CPU, True, channels_last=True):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last_3d)
    gradient = torch.rand(y.shape)
    mine = torch.autograd.grad(y, (layer.weight, layer.bias, x), gradient.bfloat16())
    exact = torch.autograd.grad(layer(x), (layer.weight, layer.bias, x), gradient)
    for a, b in zip((y, *mine), (layer(x), *exact), strict=True):
        assert (a.float() - b).norm() <= 0.04 * b.norm()  # as above


def test_a_first_layer_called_otherwise_is_left_to_torch():
    x, layer = torch.rand(1, 1, 8, 8, 8), nn.Conv3d(1, 4, 3, padding="same")
    with devices.autocast(CPU, True, channels_last=True):
        assert layer(x).shape == F.conv3d(x, layer.weight, padding=1).shape == (1, 4, 8, 8, 8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_average_pooling_keeps_type_and_layout(dtype, layout):
    x = torch.rand(2, 8, 4, 4, 4).to(dtype, memory_format=layout)
    with devices.autocast(CPU, dtype == torch.bfloat16):
        pooled = F.avg_pool3d(x, 2, 2)
    assert pooled.dtype == dtype and pooled.is_contiguous(memory_format=layout)
    torch.testing.assert_close(pooled.float(), F.avg_pool3d(x.float(), 2, 2), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (False, True), (True, False)])
def test_a_cpu_with_amx_or_avx512_has_bfloat16_if_torch_can_say_so(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert devices.has_bfloat16(CPU) == (amx or avx512)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert devices.has_bfloat16(CPU) == avx512


AUTO = [(CPU, "densenet121", True), (CPU, "mobilenetv2", False), (GPU, "mobilenetv2", True)]


@pytest.mark.parametrize(("device", "model", "pays"), AUTO)
def test_bfloat16_is_used_as_set_or_where_it_pays(monkeypatch, device, model, pays):
    used = lambda precision: devices.uses_bfloat16(Params(precision=precision), device, model)  # noqa: E731
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    assert (used("float32"), used("auto"), used("bfloat16")) == (False, pays, True)
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    assert (used("float32"), used("auto")) == (False, False)
    with pytest.raises(ValueError, match=rf"this {device.type} has no bfloat16 .* set `float32`"):
        used("bfloat16")


@pytest.mark.parametrize(("n", "auto", "absent"), [(0, CPU, "cuda"), (2, GPU, "cuda:2")])
def test_an_absent_gpu_is_refused_and_auto_takes_what_there_is(monkeypatch, n, auto, absent):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    assert devices.device_of(Params(device="auto")) == auto
    with pytest.raises(ValueError, match=rf"{absent} is set, but torch sees {n} GPU.*`cpu`"):
        devices.device_of(Params(device=absent))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096  # bytes


def keep_and_release():
    devices.prepare(1)
    devices.release_memory()  # what earlier tests left
    start, size = resident(), 2**27
    x = torch.ones(size // 4)
    del x
    assert resident() - start > 0.9 * size
    devices.release_memory()
    assert resident() - start < 0.1 * size


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory, read from /proc")
def test_freed_memory_is_kept_for_the_next_step_until_it_is_released():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(keep_and_release).result()


def test_threads_are_those_asked_for_and_one_in_a_block_even_if_it_fails():
    for asked in (2, 0):  # 0 leaves them
        devices.prepare(asked)
        with pytest.raises(ValueError), devices.one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError
        assert torch.get_num_threads() == 2
