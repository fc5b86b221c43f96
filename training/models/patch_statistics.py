"""Mean and covariance of the 3x3 patches of a batch of images, without forming the patches.

Notation: n images, C channels and H x W pixels of an image, L length of a line of pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

SIDE = 3
EXACT_PIXELS = 2**13
"""Pixels whose products are summed in float32; such sums are added in float64. Longer sums lose accuracy."""


@torch.no_grad()
def patch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, (9C,), and biased covariance, (9C, 9C), of the zero-padded patches around all pixels, in float64.

    The order of a patch is that of `F.unfold` and of the weights of a convolution. Over the patches around all pixels
    and around the ring just outside the image, the sum of the products of two entries depends only on their distance:
    it is an autocorrelation of the images, which costs as much as a convolution. The patches around the ring hold one
    line of pixels each, along a side of the image; they are subtracted.

    Args:
        x: images, float32 or float64, (n, C, H, W).
    """
    n, C, H, W = x.shape
    correlation = x.new_zeros((C, C, 2 * SIDE - 1, 2 * SIDE - 1), dtype=torch.float64)
    for part in x.split(max(1, EXACT_PIXELS // (H * W))):
        correlation += conv2d_weight(part, correlation.shape, part, padding=SIDE - 1)
    place = torch.arange(SIDE, device=x.device)
    distance = place - place[:, None] + SIDE - 1
    # (C, C', y, y', x, x') -> (C, y, x, C', y', x')
    product = correlation[:, :, distance][..., distance].permute(0, 2, 4, 1, 3, 5).contiguous()
    total = x.sum(dim=(0, 2, 3), dtype=torch.float64)[:, None, None].repeat(1, SIDE, SIDE)
    # A side of the image is the last line of the patches above or left of it, and the first line of those on the other
    # side of it. Those at the corners count once, with the upper and lower sides.
    rows, columns = (product, total), (product.transpose(1, 2).transpose(4, 5), total.transpose(1, 2))
    for (product_of, total_of), line, padding, index in (
        (rows, x[:, :, 0], SIDE - 1, SIDE - 1),
        (rows, x[:, :, -1], SIDE - 1, 0),
        (columns, x[..., 0], SIDE // 2, SIDE - 1),
        (columns, x[..., -1], SIDE // 2, 0),
    ):
        windows = F.pad(line, (padding, padding)).unfold(2, SIDE, 1)  # (n, C, L, 3)
        outside = windows.permute(1, 3, 0, 2).flatten(2).flatten(0, 1).double()
        product_of[:, index, :, :, index] -= (outside @ outside.T).view(C, SIDE, C, SIDE)
        total_of[:, index] -= outside.sum(dim=1).view(C, SIDE)
    mean = total.flatten() / (n * H * W)
    return mean, product.view(C * SIDE**2, -1) / (n * H * W) - mean.outer(mean)
