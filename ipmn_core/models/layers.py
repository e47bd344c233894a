"""Layers shared by MobileNet-V2 and ShuffleNet-V2."""

from torch import nn


def conv_bn(n_in: int, n_out: int, kernel: int = 1, stride=1, groups: int = 1, act=nn.ReLU) -> nn.Sequential:
    """Convolution without bias, batch norm, activation; the padding lets only the stride change the size."""
    conv = nn.Conv3d(n_in, n_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(n_out), act())


def classifier(n_features: int, n_classes: int) -> nn.Sequential:
    """Global average pooling, dropout 0.2 and a linear layer."""
    layers = nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(n_features, n_classes)
    return nn.Sequential(*layers)
