"""Resizing of images to the encoder's input size, and multi-crop averaging of features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import Average

CROP = 0.85
"""Side of a crop, as a fraction of the image's side."""


class MultiCropEncoder(nn.Module):
    """Resizes images to `size` (bilinear, antialiased) and encodes them: (n, C, H, W) -> (n, F).

    In evaluation mode the features are the mean over several views of each image (10-crop testing, Krizhevsky et al.,
    NeurIPS 2012). `mirror`: the image and its horizontal flip. `crops`: these two, and the four corner crops and the
    centre crop with their flips, 12 views. In training mode each image is encoded once.

    Args:
        net: the encoder, with attribute `feature_dim`.
        size: (height, width) of the images that `net` sees.
        averaging: which views are averaged.
    """

    def __init__(self, net: nn.Module, size: tuple[int, int], averaging: Average = "none") -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.averaging = averaging
        self.feature_dim: int = net.feature_dim  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.averaging == "none":
            return self._encode(x)
        views = [x, x.flip(-1)]
        if self.averaging == "crops":
            from torchvision.transforms.v2.functional import ten_crop

            views += ten_crop(x, [max(1, round(CROP * side)) for side in x.shape[-2:]])
        total = self._encode(views[0])
        for view in views[1:]:
            total = total + self._encode(view)
        return total / len(views)

    def _encode(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        return self.net(x)


def with_averaging(net: nn.Module, size: tuple[int, int], averaging: Average) -> MultiCropEncoder:
    """The same encoder with another multi-crop averaging; `size` of the images, unless `net` resizes them already."""
    if isinstance(net, MultiCropEncoder):
        return MultiCropEncoder(net.net, net.size, averaging)
    return MultiCropEncoder(net, size, averaging)
