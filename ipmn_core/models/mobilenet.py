"""MobileNet-V2 in 3D."""

from torch import Tensor, nn

from ipmn_core.models.layers import classifier, conv_bn


class InvertedResidual(nn.Module):
    """Expand, convolve by channel, linear bottleneck (MobileNet-V2: Sandler et al., 2018, Fig. 4)."""

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
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    for expansion, n_out, repeats, stride in [*rows, (6, 320, 1, 1)]:
        for repeat in range(repeats):
            layers.append(InvertedResidual(n_in, n_out, stride if repeat == 0 else 1, expansion))
            n_in = n_out
    return nn.Sequential(*layers, conv_bn(320, 1280, act=nn.ReLU6), classifier(1280, n_classes))
