"""Normalisation of images by the colour statistics of ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of red, green and blue that torchvision's weights expect."""


class ImageNetNormalisation(nn.Module):
    """(x - mean) / std for each colour: images (n, 3, H, W) in [0, 1] -> (n, 3, H, W). It has no state to store."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
