"""Convolutional encoders (Tables 3 and 6), the decoder of images (Table 4) and the decoder of features (Table 8).

Tables of Lee et al., ICLR 2021. Images may have any size. The decoder of images goes through the sizes of Conv4
backwards.

Notation: n images or latents, C channels and H x W pixels of an image, F feature size, D latent size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.normalisation import ImageNetNormalisation
from metagmvae.training.models.patch_statistics import patch_statistics

LEVELS = 4
CACHED_VALUES = 2**20
"""Values of feature maps that a folded block computes and pools at a time: they stay in the processor's cache."""


def pooled_sizes(size: int, levels: int = LEVELS, round_up: bool = True) -> list[int]:
    """Side lengths of the image and of each feature map: 28 -> [28, 14, 7, 4, 2]; `round_up` as in Table 3."""
    sizes = [size]
    for _ in range(levels):
        sizes.append((sizes[-1] + round_up) // 2)
    return sizes


def max_pool(x: Tensor, round_up: bool) -> Tensor:
    """2x2 max pooling: (n, C, H, W) -> (n, C, H/2, W/2).

    For inference on a CPU as maxima of slices, where the sides are even: half the time, because PyTorch's function also
    stores the positions of the maxima.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[-2] % 2 or x.shape[-1] % 2:
        return F.max_pool2d(x, 2, ceil_mode=round_up)
    columns = torch.maximum(x[..., ::2], x[..., 1::2])
    return torch.maximum(columns[..., ::2, :], columns[..., 1::2, :])


class ConvBlock(nn.Module):
    """conv 3x3, batch normalisation, ReLU (if `relu`), 2x2 max pooling: (n, C, s, s) -> (n, channels, s/2, s/2).

    ReLU and max pooling commute; pooling first leaves ReLU a quarter of the values. In a first block (1 to 4 input
    channels) the normalisation is folded into the convolution: the mean and variance of its outputs over the batch
    follow exactly from the mean and covariance of the 3x3 input patches. The largest feature map of the network is then
    written once, instead of being written, read for its statistics and written again, and a few images at a time, which
    stay in the cache until they are pooled. The patch statistics carry no gradient to the input, so the folded form is
    used only where the input needs none, and on a CPU only. In evaluation mode the normalisation is folded into every
    block.
    """

    def __init__(self, inputs: int, channels: int, round_up: bool = True, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fold = inputs <= 4
        self.round_up = round_up
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        foldable = self.fold or self._running_statistics() is not None
        if not foldable or x.requires_grad or x.device.type != "cpu":
            return self._activated(self.norm(self.conv(x)))
        weight, bias = self._folded_norm(x)
        values_of_map = len(weight) * x[0, 0].numel()
        parts = x.split(max(1, CACHED_VALUES // values_of_map))
        return torch.cat([self._activated(F.conv2d(part, weight, bias, padding=1)) for part in parts])

    def _activated(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, self.round_up)
        return F.relu(pooled, inplace=True) if self.relu else pooled

    def _folded_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of norm(conv(x)) as one convolution."""
        mean, variance = self._statistics(x)
        factor = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        return self.conv.weight * factor[:, None, None, None], self.norm.bias - mean * factor

    def _running_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance that evaluation mode uses; None where the statistics are those of the batch."""
        norm = self.norm
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return None
        return norm.running_mean, norm.running_var

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the convolution's outputs, (channels,) each; updates the running statistics.

        Without running statistics (as MAML has its networks) they are always those of the batch.
        """
        norm, fixed = self.norm, self._running_statistics()
        if fixed is not None:
            return fixed
        with torch.autocast(x.device.type, enabled=False):
            kernel = at_least_float32(self.conv.weight).flatten(1)
            patch_mean, covariance = (value.to(kernel.dtype) for value in patch_statistics(at_least_float32(x)))
            mean = kernel @ patch_mean
            variance = ((kernel @ covariance) * kernel).sum(dim=1).clamp_min(0)  # rounding can make 0 negative
        if norm.running_mean is None or norm.running_var is None:
            return mean, variance
        count = len(x) * x[0, 0].numel()
        with torch.no_grad():
            momentum = norm.momentum or 0.0
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked += 1
        return mean, variance


class ConvEncoder(nn.Module):
    """Conv4 or Conv5: (n, C, H, W) in [0, 1] -> (n, F), F = channels * h * w of the last feature map.

    Pooling rounds up in Conv4 (Table 3: 28 -> 14 -> 7 -> 4 -> 2) and down in Conv5 (Table 6: 84 -> 42 -> 21 -> 10 -> 5
    -> 2). Both tables end in a ReLU; without it (`final_relu`) the features have both signs, which is better for a
    contrastive loss. With `normalise`, colours are first normalised by the statistics of ImageNet (published code of
    SimCLR), so the zero padding of the first convolution is ImageNet's mean colour.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: int,
        levels: int = LEVELS,
        round_up: bool = True,
        final_relu: bool = True,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        inputs, *sides = image_shape
        if normalise and inputs != 3:
            raise ValueError(f'model.normalise ("imagenet") needs three channels, images have {inputs}; set it to none')
        last_map = [pooled_sizes(side, levels, round_up)[-1] for side in sides]
        if not all(last_map):
            raise ValueError(
                f"images of {sides[0]} x {sides[1]} pixels are too small for {levels} poolings; use conv4, or set "
                "model.image_size"
            )
        blocks = [
            ConvBlock(inputs if level == 0 else channels, channels, round_up, final_relu or level < levels - 1)
            for level in range(levels)
        ]
        self.normalise = ImageNetNormalisation() if normalise else None
        self.blocks = nn.Sequential(*blocks)
        self.feature_dim = channels * math.prod(last_map)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalise is not None:
            x = self.normalise(x)
        # contiguous(): the order of the flattened features must not depend on the memory format.
        return self.blocks(x).contiguous().flatten(1)


class ConvDecoder(nn.Module):
    """Table 4: latents (n, D) -> logits of the Bernoulli means, (n, C, H, W). The sigmoid is part of the loss.

    With `width` 0 the latent is the first feature map, or a linear layer gives it where the sizes differ. Without
    `batch_norm`, a loss of small batches is not held at the mean image.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], channels: int, latent: int, width: int, batch_norm: bool = True
    ) -> None:
        super().__init__()
        outputs, image_height, image_width = image_shape
        heights = pooled_sizes(image_height)[::-1]
        widths = pooled_sizes(image_width)[::-1]
        self.first = (channels, heights[0], widths[0])
        map_size = math.prod(self.first)
        self.mlp: nn.Module
        if width:
            self.mlp = nn.Sequential(
                nn.Linear(latent, width),
                nn.ELU(),
                nn.Linear(width, width),
                nn.ELU(),
                nn.Linear(width, map_size),
                nn.ELU(),
            )
        else:
            self.mlp = nn.Identity() if latent == map_size else nn.Linear(latent, map_size)
        layers: list[nn.Module] = []
        for level in range(LEVELS):
            last = level == LEVELS - 1
            # Kernel 4 doubles a side s; kernel 3 gives 2s - 1.
            kernel = (
                4 if heights[level + 1] == 2 * heights[level] else 3,
                4 if widths[level + 1] == 2 * widths[level] else 3,
            )
            out = outputs if last else channels
            layers.append(nn.ConvTranspose2d(channels, out, kernel, stride=2, padding=1, bias=last or not batch_norm))
            if not last:
                layers += [nn.BatchNorm2d(channels)] * batch_norm + [nn.ReLU(inplace=True)]
        self.deconv = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.mlp(z).unflatten(1, self.first)
        return self.deconv(maps)


class FeatureDecoder(nn.Module):
    """Table 8: latents (n, D) -> means of the features, (n, F).

    `final_relu` is the last ReLU of the table, for the raw features of Conv5. Standardised features have negative
    values, so their decoder has none.
    """

    def __init__(self, feature_dim: int, latent: int, final_relu: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(latent, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, feature_dim),
            *([nn.ReLU()] if final_relu else []),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(z)
