"""SimCLR's augmentation of photos: random crops, flips and colour changes (Chen et al., ICML 2020, appendix A).

torchvision draws one set of parameters per call; here each image of a batch has its own, drawn on the batch's device.
The colour changes equal torchvision's functions applied image by image, and crops can have the distribution of its
RandomResizedCrop (both tested). Two differences: crops are resized bilinearly without antialiasing, and one random
order of the colour changes holds for a whole batch. There is no blur, as in Lee et al. All randomness comes from the
generator argument.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.seeding import host_permutation, uniform

CROP_RATIO = (3 / 4, 4 / 3)
"""Range of width / height of a crop."""
CROP_TRIES = 10
"""Draws of a crop that must lie inside the image, before the fallback."""
BRIGHTNESS = CONTRAST = SATURATION = 0.8
"""Factors are drawn from [1 - value, 1 + value]."""
HUE = 0.2
"""Largest hue shift, as a fraction of the colour circle."""
JITTER_PROBABILITY = 0.8
GRAYSCALE_PROBABILITY = 0.2
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the luminance."""


Crops = Literal["clipped", "torchvision"]
"""What happens to a drawn rectangle that exceeds the image: it is clipped, or drawn again as in torchvision."""


class Rectangles(NamedTuple):
    """One rectangle per image, (n,) each, in units in which the image is the square [-1, 1] x [-1, 1]."""

    x: Tensor
    """Centre."""
    y: Tensor
    width: Tensor
    """In units of the image's width, in (0, 1]."""
    height: Tensor


def photo_view(
    images: Tensor, generator: torch.Generator, size: int, min_area: float = 0.08, crops: Crops = "clipped"
) -> Tensor:
    """One random view of each image: (n, C, H, W) in [0, 1] -> (n, C, size, size) in [0, 1].

    Saturation and hue change for three channels only. A crop covers between `min_area` and all of the image's area.
    """
    x = _random_crop(images, generator, size, min_area, crops)
    draw = uniform((len(x), 6), x, generator)
    jittered = draw[:, 4] < 2 * JITTER_PROBABILITY - 1
    jitter = torch.where(jittered[:, None], draw[:, :4], 0.0)
    changes = [
        lambda x: _blend(x, torch.zeros_like(x), 1 + BRIGHTNESS * jitter[:, 0]),
        lambda x: _blend(x, to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True), 1 + CONTRAST * jitter[:, 1]),
    ]
    if x.shape[1] == 3:
        changes.append(lambda x: _blend(x, to_grayscale(x), 1 + SATURATION * jitter[:, 2]))
        changes.append(lambda x: shift_hue(x, HUE * jitter[:, 3]))
    for index in host_permutation(len(changes), generator):
        x = changes[index](x)
    grayscale = draw[:, 5] < 2 * GRAYSCALE_PROBABILITY - 1
    return torch.where(grayscale[:, None, None, None], to_grayscale(x), x)


def _random_crop(
    images: Tensor, generator: torch.Generator, size: int, min_area: float, crops: Crops = "clipped"
) -> Tensor:
    """A random rectangle of each image, flipped horizontally with probability 1/2 and resized to `size`."""
    n = len(images)
    draw = (uniform((n, 5), images, generator) + 1) / 2
    if crops == "clipped":
        x, y, width, height = _clipped_rectangles(draw, min_area)
    else:
        tries = (uniform((n, CROP_TRIES, 2), images, generator) + 1) / 2
        x, y, width, height = _redrawn_rectangles(tries, draw[:, 2:4], images.shape[-2:], min_area)
    flipped_width = torch.where(draw[:, 4] < 0.5, -width, width)
    zero = torch.zeros_like(x)
    matrix = torch.stack([torch.stack([flipped_width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(matrix, [n, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _area_and_ratio(draw: Tensor, min_area: float) -> tuple[Tensor, Tensor]:
    """Uniform area in [min_area, 1] and log-uniform width / height, from uniform numbers (..., 2) in [0, 1)."""
    log_min, log_max = (math.log(ratio) for ratio in CROP_RATIO)
    return min_area + (1 - min_area) * draw[..., 0], torch.exp(log_min + (log_max - log_min) * draw[..., 1])


def _clipped_rectangles(draw: Tensor, min_area: float) -> Rectangles:
    """Rectangles whose sides are clipped to the image, from uniform numbers (n, >= 4) in [0, 1)."""
    area, ratio = _area_and_ratio(draw, min_area)
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    return Rectangles((1 - width) * (2 * draw[:, 2] - 1), (1 - height) * (2 * draw[:, 3] - 1), width, height)


def _redrawn_rectangles(tries: Tensor, position: Tensor, image_size: torch.Size, min_area: float) -> Rectangles:
    """Rectangles with the distribution of torchvision's RandomResizedCrop: whole pixels, inside the image.

    The first of the tries that fits counts. If none fits: the largest central rectangle of an allowed ratio.

    Args:
        tries: uniform numbers in [0, 1), (n, CROP_TRIES, 2).
        position: uniform numbers in [0, 1), (n, 2).
        image_size: (H, W) of the images.
        min_area: smallest area, as a fraction of the image.
    """
    H, W = image_size
    area, ratio = _area_and_ratio(tries, min_area)
    widths, heights = (area * (H * W) * ratio).sqrt().round(), (area * (H * W) / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= W) & (heights > 0) & (heights <= H)
    first = fits.byte().argmax(dim=1, keepdim=True)
    none_fits = ~fits.any(dim=1)
    width = widths.gather(1, first)[:, 0].masked_fill(none_fits, min(W, round(H * CROP_RATIO[1])))
    height = heights.gather(1, first)[:, 0].masked_fill(none_fits, min(H, round(W / CROP_RATIO[0])))
    left = torch.where(none_fits, (W - width) // 2, _whole_pixels(position[:, 0], W - width))
    top = torch.where(none_fits, (H - height) // 2, _whole_pixels(position[:, 1], H - height))
    return Rectangles((2 * left + width) / W - 1, (2 * top + height) / H - 1, width / W, height / H)


def _whole_pixels(draw: Tensor, largest: Tensor) -> Tensor:
    """A uniform integer from 0 to `largest` (included), from a uniform number in [0, 1)."""
    return torch.minimum((draw * (largest + 1)).floor(), largest)


def to_grayscale(x: Tensor) -> Tensor:
    """Luminance in every channel, (n, C, H, W) -> (n, C, H, W); images without three channels stay unchanged."""
    if x.shape[1] != 3:
        return x
    weight = x.new_tensor(LUMA)[:, None, None]
    return (x * weight).sum(dim=1, keepdim=True).expand_as(x)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, clipped to [0, 1]; `factor` (n,)."""
    factor = factor[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of each image by a fraction of the colour circle: (n, 3, H, W), (n,) -> (n, 3, H, W)."""
    high, low = x.amax(dim=1), x.amin(dim=1)
    chroma = high - low
    safe_chroma = torch.where(chroma > 0, chroma, 1.0)
    red, green, blue = x.unbind(1)
    # Hue in sixths of the circle, counted from red; arbitrary for grey pixels, whose chroma is 0.
    hue = torch.where(
        high == red,
        (green - blue) / safe_chroma,
        torch.where(high == green, 2 + (blue - red) / safe_chroma, 4 + (red - green) / safe_chroma),
    )
    hue = hue + 6 * shift[:, None, None]
    k = (x.new_tensor([5.0, 3.0, 1.0])[:, None, None] + hue[:, None]) % 6
    return (high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)
