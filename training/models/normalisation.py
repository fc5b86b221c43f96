"""Normalisation of images by the colour statistics that a network was trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of red, green and blue that most of torchvision's weights expect."""


class ColourNormalisation(nn.Module):
    """(x - mean) / std for each channel: images (n, C, H, W) in [0, 1] -> (n, C, H, W).

    Mean and standard deviation are stored with the weights, so that they do not depend on the version of a library.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], *, stored: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=stored)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=stored)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ImageNetNormalisation(ColourNormalisation):
    """`ColourNormalisation` with ImageNet's statistics. It has no state to store."""

    def __init__(self) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD, stored=False)
