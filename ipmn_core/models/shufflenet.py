"""ShuffleNet-V2 in 3D."""

import torch
from torch import Tensor, nn

from ipmn_core.models.layers import classifier, conv_bn


class ShuffleUnit(nn.Module):
    """The unit of ShuffleNet-V2: two branches, concatenated and shuffled (Ma et al., 2018, Fig. 3c and 3d).

    With stride 1 the channels are split and the first half passes unchanged; with stride 2 both branches see
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
