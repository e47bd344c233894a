"""The paper's five 3D CNNs and ResNet-50 by name, and their MACs and parameters (Table 2).

The ResNets, EfficientNet-B0 and DenseNet-121 are MONAI's. `mobilenet` and `shufflenet` are 3D forms of the 2D
papers, after Köpüklü et al. (2019, arXiv 1904.02422): the first convolution has stride (1, 2, 2), and weights
are initialized as in PyTorch's layers. Every model maps (N, 1, D, H, W) to logits (N, n_classes).
"""

from collections.abc import Callable
from functools import partial

import torch
from ptflops import get_model_complexity_info
from torch import nn

from ipmn_core.models.densenet import FUSIONS, densenet121
from ipmn_core.models.mobilenet import mobilenetv2
from ipmn_core.models.shufflenet import shufflenetv2


def resnet(n_classes: int, depth: int) -> nn.Module:
    """A ResNet (He et al., 2016). Its first convolution keeps the resolution, so it has many MACs."""
    from monai.networks import nets

    return getattr(nets, f"resnet{depth}")(spatial_dims=3, n_input_channels=1, num_classes=n_classes)


def efficientnetb0(n_classes: int) -> nn.Module:
    """EfficientNet-B0 (Tan and Le, 2019), not pretrained."""
    from monai.networks import nets

    return nets.EfficientNetBN("efficientnet-b0", False, spatial_dims=3, in_channels=1, num_classes=n_classes)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet34": partial(resnet, depth=34),
    "shufflenetv2": shufflenetv2,
    "mobilenetv2": mobilenetv2,
    "efficientnetb0": efficientnetb0,
    "densenet121": densenet121,
    "resnet50": partial(resnet, depth=50),  # departs from the paper: in the data set's newer code
}

# Networks that a CPU trains faster in channels-last; EfficientNet-B0 would take twice as long.
CHANNELS_LAST = {"resnet34", "shufflenetv2", "mobilenetv2", "densenet121"}
DEPTHWISE = {"shufflenetv2", "mobilenetv2", "efficientnetb0"}  # with convolutions of one channel each


def factory(name: str) -> Callable[[int], nn.Module]:
    """Return the entry of MODELS called `name`. Raises ValueError with the known names for another name."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]


def build(name: str, n_classes: int, seed: int = 0, fusion: str = "") -> nn.Module:
    """Build a model on the CPU with weights drawn from `seed`; the caller's random state is unchanged.

    With `fusion`, build that network of FUSIONS instead: a DenseNet-121 for cubes (N, 2, D, H, W). Raises
    ValueError for a name that is not in MODELS.
    """
    make = FUSIONS[fusion] if fusion else factory(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
        return make(n_classes)


def complexity(name: str, n_classes: int = 3, size: int = 96) -> tuple[float, float]:
    """Count MACs (G) and parameters (M) for one 1 x size x size x size input with ptflops (Table 2).

    Weights and input are shapes on the meta device. There ptflops may count the last linear layer twice,
    which does not change the printed digits. Raises ValueError for a name that is not in MODELS.
    """
    make = factory(name)
    with torch.device("meta"):
        model, x = make(n_classes).eval(), torch.empty(1, 1, size, size, size)
    model(x)  # torch must finish its lazy imports before ptflops patches torch's functions
    macs, params = get_model_complexity_info(
        model, (1, size, size, size), print_per_layer_stat=False, as_strings=False, backend="pytorch"
    )
    return macs / 1e9, params / 1e6
