"""Views of photographs for contrastive training: SimCLR's crops, flips and colours (Chen et al. 2020, appendix A).

torchvision's transforms draw one set of parameters for a batch; here each image has its own, on the batch's device.
Colours are torchvision's functions image by image (tested against them); the crop is sampled bilinearly without
smoothing, where torchvision smooths what shrinks, and the order of the four colour changes is one for a batch. Blur is
left out, as the paper does. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.seeding import uniform

CROP_RATIO = (3 / 4, 4 / 3)
BRIGHTNESS = CONTRAST = SATURATION = 0.8
HUE = 0.2
JITTERED = 0.8
GREYED = 0.2
"""Shares of the images."""
LUMA = (0.2989, 0.587, 0.114)


def photo_view(images: Tensor, generator: torch.Generator, size: int, least: float = 0.08) -> Tensor:
    """One random view of each image: (n, C, H, W) in [0, 1] -> (n, C, size, size) in [0, 1].

    Colours change for three channels only; grey photographs change in brightness and contrast. A view shows between
    `least` and all of the image's area.
    """
    x = _crop(images, generator, size, least)
    draw = uniform((len(x), 6), x, generator)
    jittered = draw[:, 4] < 2 * JITTERED - 1
    factors = torch.where(jittered[:, None], draw[:, :4], 0.0)
    change = [
        lambda x: _blend(x, torch.zeros_like(x), 1 + BRIGHTNESS * factors[:, 0]),
        lambda x: _blend(x, grey(x).mean(dim=(1, 2, 3), keepdim=True), 1 + CONTRAST * factors[:, 1]),
    ]
    if x.shape[1] == 3:
        change.append(lambda x: _blend(x, grey(x), 1 + SATURATION * factors[:, 2]))
        change.append(lambda x: turn_hue(x, HUE * factors[:, 3]))
    for number in torch.randperm(len(change), generator=generator, device=generator.device).tolist():
        x = change[number](x)
    greyed = draw[:, 5] < 2 * GREYED - 1
    return torch.where(greyed[:, None, None, None], grey(x), x)


def _crop(images: Tensor, generator: torch.Generator, size: int, least: float) -> Tensor:
    """A random rectangle of each image, mirrored or not, at one size."""
    n = len(images)
    draw = (uniform((n, 5), images, generator) + 1) / 2
    area = least + (1 - least) * draw[:, 0]
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.exp(low + (high - low) * draw[:, 1])
    # Where a rectangle would stick out it is cut to the image, where torchvision draws again.
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    x, y = (1 - width) * (2 * draw[:, 2] - 1), (1 - height) * (2 * draw[:, 3] - 1)
    mirrored = torch.where(draw[:, 4] < 0.5, -width, width)
    zero = torch.zeros_like(x)
    matrix = torch.stack([torch.stack([mirrored, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(matrix, [n, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """Luminance, as many channels as came in."""
    if x.shape[1] != 3:
        return x
    weight = x.new_tensor(LUMA)[:, None, None]
    return (x * weight).sum(dim=1, keepdim=True).expand_as(x)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, kept in [0, 1]."""
    factor = factor[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of each image by a share of the circle: (n, 3, H, W), (n,) -> (n, 3, H, W)."""
    high, low = x.amax(dim=1), x.amin(dim=1)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    red, green, blue = x.unbind(1)
    # Sixths of the circle from red; grey pixels have none.
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turn[:, None, None]
    k = (x.new_tensor([5.0, 3.0, 1.0])[:, None, None] + hue[:, None]) % 6
    fall = torch.minimum(k, 4 - k).clamp(0, 1)
    return (high[:, None] - chroma[:, None] * fall).clamp(0, 1)
