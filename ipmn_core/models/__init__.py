"""The paper's five 3D CNNs by name, and their MACs and parameters (Table 2).

ResNet-34, EfficientNet-B0 and DenseNet-121 are MONAI's. MobileNet-V2 and ShuffleNet-V2, which MONAI lacks,
are written here as 3D forms of the 2D papers, after Köpüklü et al. (2019, arXiv 1904.02422): the first
convolution has stride (1, 2, 2), weights start as PyTorch's layers do. Every model maps (N, 1, D, H, W) to
logits (N, n_classes).
"""

from collections.abc import Callable

import torch
from ptflops import get_model_complexity_info
from torch import Tensor, nn


def resnet34(n_classes: int) -> nn.Module:
    """ResNet-34 (He et al., 2016); the first convolution keeps the resolution, hence its many MACs."""
    from monai.networks import nets

    return nets.resnet34(spatial_dims=3, n_input_channels=1, num_classes=n_classes)


def efficientnetb0(n_classes: int) -> nn.Module:
    """EfficientNet-B0 (Tan and Le, 2019)."""
    from monai.networks.nets import EfficientNetBN

    return EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1, num_classes=n_classes
    )


def densenet121(n_classes: int) -> nn.Module:
    """DenseNet-121 (Huang et al., 2017)."""
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=n_classes)


def conv_bn(n_in: int, n_out: int, kernel: int = 1, stride=1, groups: int = 1, act=nn.ReLU) -> nn.Sequential:
    """Convolution without bias, batch norm, activation; padded so that only the stride changes the size."""
    conv = nn.Conv3d(n_in, n_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(n_out), act())


def classifier(n_features: int, n_classes: int) -> nn.Sequential:
    """Global average pooling, dropout 0.2 and a linear layer."""
    return nn.Sequential(
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(n_features, n_classes)
    )


class InvertedResidual(nn.Module):
    """MobileNet-V2's block: expand, convolve by channel, linear bottleneck (Sandler et al., 2018, Fig. 4)."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = n_in * expansion
        expand = [conv_bn(n_in, hidden, act=nn.ReLU6)] if expansion > 1 else []
        depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6)
        self.body = nn.Sequential(*expand, depthwise, conv_bn(hidden, n_out, act=nn.Identity))
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenetv2(n_classes: int) -> nn.Module:
    """MobileNet-V2, width 1.0 (Sandler et al., 2018, Table 2)."""
    layers, n_in = [conv_bn(1, 32, 3, (1, 2, 2), act=nn.ReLU6)], 32
    rows = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    for expansion, n_out, repeats, stride in rows:
        for repeat in range(repeats):
            layers.append(InvertedResidual(n_in, n_out, stride if repeat == 0 else 1, expansion))
            n_in = n_out
    return nn.Sequential(*layers, conv_bn(320, 1280, act=nn.ReLU6), classifier(1280, n_classes))


class ShuffleUnit(nn.Module):
    """ShuffleNet-V2's unit: two branches, concatenated and shuffled (Ma et al., 2018, Fig. 3c and 3d).

    With stride 1 the channels are split and the first half passes as it is; with stride 2 both branches see
    every channel.
    """

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        half, self.split = n_out // 2, stride == 1
        n_branch = half if self.split else n_in
        self.main = nn.Sequential(
            conv_bn(n_branch, half),
            conv_bn(half, half, 3, stride, groups=half, act=nn.Identity),
            conv_bn(half, half),
        )
        depthwise = conv_bn(n_in, n_in, 3, stride, groups=n_in, act=nn.Identity)
        self.shortcut = nn.Identity() if self.split else nn.Sequential(depthwise, conv_bn(n_in, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.split else (x, x)
        joined = torch.cat([self.shortcut(left), self.main(right)], dim=1)
        return joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # interleave the two branches


def shufflenetv2(n_classes: int) -> nn.Module:
    """ShuffleNet-V2, width 1.0x (Ma et al., 2018, Table 5)."""
    layers, n_in = [conv_bn(1, 24, 3, (1, 2, 2)), nn.MaxPool3d(3, stride=2, padding=1)], 24
    for n_out, repeats in [(116, 4), (232, 8), (464, 4)]:
        for repeat in range(repeats):
            layers.append(ShuffleUnit(n_in, n_out, stride=2 if repeat == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, conv_bn(464, 1024), classifier(1024, n_classes))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet34": resnet34,
    "shufflenetv2": shufflenetv2,
    "mobilenetv2": mobilenetv2,
    "efficientnetb0": efficientnetb0,
    "densenet121": densenet121,
}

# Networks that a CPU trains faster in channels-last; EfficientNet-B0 would need twice its time there.
CHANNELS_LAST = {"resnet34", "shufflenetv2", "mobilenetv2", "densenet121"}
DEPTHWISE = {"shufflenetv2", "mobilenetv2", "efficientnetb0"}  # with convolutions of one channel each


def factory(name: str) -> Callable[[int], nn.Module]:
    """The entry of MODELS under `name`; ValueError with the known names if there is none."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]


def build(name: str, n_classes: int, seed: int = 0) -> nn.Module:
    """A model on the CPU, its weights drawn from `seed` alone; the caller's random state stays as it was.

    Raises ValueError for a name that is not in MODELS.
    """
    make = factory(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
        return make(n_classes)


def complexity(name: str, n_classes: int = 3, size: int = 96) -> tuple[float, float]:
    """MACs in G and parameters in M for one 1 x size x size x size input, as ptflops counts them (Table 2).

    Raises ValueError for a name that is not in MODELS. Nothing is computed: weights and input are bare shapes
    on the meta device. There ptflops may count the last linear layer twice, far below the printed digits.
    """
    make = factory(name)
    with torch.device("meta"):
        model, x = make(n_classes).eval(), torch.empty(1, 1, size, size, size)
    model(x)  # so that torch ends its lazy imports before ptflops patches torch's functions
    macs, params = get_model_complexity_info(
        model, (1, size, size, size), print_per_layer_stat=False, as_strings=False, backend="pytorch"
    )
    return macs / 1e9, params / 1e6
