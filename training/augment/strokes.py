"""Views of strokes for contrastive training: random affine, smooth elastic field, thicker or thinner strokes.

On whole batches, on the batch's device. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.seeding import uniform

ROTATION = math.radians(25)
LOG_SCALE = 0.25
SHEAR = 0.35
SHIFT = 0.2
CONTROL_POINTS = 4


def stroke_view(images: Tensor, generator: torch.Generator, elastic: float, strength: float = 1.0) -> Tensor:
    """One random view of each image: (n, C, H, W) in [0, 1] -> the same shape and range.

    `elastic` is the largest displacement of a control point in half widths; `strength` scales every distortion: at 0
    the images come back as they are. Strokes grow or thin for single-channel images only, where a bright stroke on a
    dark ground can be assumed.
    """
    grid = _affine_grid(images, generator, strength) + _elastic_field(images, generator, elastic * strength)
    warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _strokes(warped, generator, strength) if images.shape[1] == 1 else warped


def _affine_grid(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    n = images.shape[0]
    draw = uniform((n, 6), images, generator) * strength
    angle = draw[:, 0] * ROTATION
    cos, sin = torch.cos(angle), torch.sin(angle)
    scale_x, scale_y = torch.exp(draw[:, 1] * LOG_SCALE), torch.exp(draw[:, 2] * LOG_SCALE)
    shear = draw[:, 3] * SHEAR
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    zero = torch.zeros_like(shear)
    stretch = torch.stack([torch.stack([scale_x, shear], -1), torch.stack([zero, scale_y], -1)], 1)
    shift = draw[:, 4:6, None] * SHIFT
    matrix = torch.cat([rotation @ stretch, shift], dim=2)
    return F.affine_grid(matrix, list(images.shape), align_corners=False)


def _elastic_field(images: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """A smooth displacement from 4x4 control points: (n, H, W, 2), in half widths."""
    n, _, height, width = images.shape
    control = uniform((n, 2, CONTROL_POINTS, CONTROL_POINTS), images, generator) * most
    field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1)


def _strokes(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Blend towards a dilation (positive draw) or a softened erosion (negative draw)."""
    amount = uniform((images.shape[0], 1, 1, 1), images, generator) * strength
    dilated = F.max_pool2d(images, 3, stride=1, padding=1)
    eroded = 0.5 * (images - F.max_pool2d(-images, 3, stride=1, padding=1))
    grow, thin = amount.clamp_min(0), (-amount).clamp_min(0)
    return (images + grow * (dilated - images) + thin * (eroded - images)).clamp(0, 1)
