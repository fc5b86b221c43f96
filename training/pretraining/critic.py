"""The critic of the adversarial objectives: scores images, or pairs of an image and a latent.

Notation: n images, C channels and H x W pixels of an image, D latent size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import LEVELS, pooled_sizes

SLOPE = 0.2
"""Slope of the leaky ReLU for negative values."""


class ImageCritic(nn.Module):
    """(n, C, H, W) and, where the critic has a latent, (n, D) -> one score each, (n,).

    Four 3x3 convolutions of stride 2, then two linear layers that see the latent too; leaky ReLU between them. There is
    no batch normalisation: it would remove what all images of a generated batch have in common.
    """

    def __init__(self, image_shape: tuple[int, int, int], channels: int, latent: int = 0) -> None:
        super().__init__()
        inputs, *sides = image_shape
        layers: list[nn.Module] = []
        for level in range(LEVELS):
            convolution = nn.Conv2d(channels if level else inputs, channels, 3, stride=2, padding=1)
            layers += [convolution, nn.LeakyReLU(SLOPE)]
        self.conv = nn.Sequential(*layers)
        map_size = math.prod(pooled_sizes(side)[-1] for side in sides)
        self.mlp = nn.Sequential(nn.Linear(channels * map_size + latent, 512), nn.LeakyReLU(SLOPE), nn.Linear(512, 1))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        # contiguous(): the order of the flattened features must not depend on the memory format.
        h = self.conv(x).contiguous().flatten(1)
        return at_least_float32(self.mlp(h if z is None else torch.cat([h, z], dim=1))[:, 0])

    def frozen(self, *inputs: Tensor) -> Tensor:
        """The same scores with constant weights: their gradient reaches the inputs only."""
        constants = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return functional_call(self, constants, inputs)
