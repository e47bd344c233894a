"""DenseNet-121 for one modality, or for two of one patient: (N, 2, D, H, W) to logits (N, n_classes)."""

from functools import partial

import torch
from torch import nn


def densenet121(n_classes: int, in_channels: int = 1) -> nn.Module:
    """DenseNet-121 (Huang et al., 2017); early fusion has one input channel per modality."""
    from monai.networks import nets

    return nets.DenseNet121(spatial_dims=3, in_channels=in_channels, out_channels=n_classes)


class Siamese(nn.Module):
    """Late fusion: one encoder with shared weights (Bromley et al., 1993), concatenated features, one layer.

    Both modalities pass the encoder in one batch, so its BatchNorm has one set of statistics.
    """

    def __init__(self, n_classes: int):
        super().__init__()
        self.encoder = densenet121(n_classes)
        n_features = self.encoder.class_layers.out.in_features
        self.encoder.class_layers.out = nn.Identity()
        self.classifier = nn.Linear(2 * n_features, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, n_classes) of cubes (N, 2, D, H, W)."""
        features = self.encoder(x.flatten(0, 1).unsqueeze(1))  # (2 N, n_features)
        return self.classifier(features.view(len(x), -1))


FUSIONS = {"channels": partial(densenet121, in_channels=2), "siamese": Siamese}
