"""How an encoder sees an image: at which size, and, once it is trained, in how many crops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import Average

CROP = 0.85
"""Side of a crop, as a share of the image's."""


class MultiCropEncoder(nn.Module):
    """An encoder that sees images at its own size, bilinear and smoothed where they shrink: (n, C, H, W) -> (n, F).

    In evaluation mode features are the mean over views of an image that should mean the same (Krizhevsky et al.,
    NeurIPS 2012, had ten): `mirror`, itself and its mirror image; `crops`, these two, and the four corners and the
    centre with theirs, twelve in all. Training sees each image once.

    Args:
        net: the encoder proper, which says F as `features`.
        size: (height, width) that `net` takes.
        average: see above.
    """

    def __init__(self, net: nn.Module, size: tuple[int, int], average: Average = "none") -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.average = average
        self.features: int = net.features  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.average == "none":
            return self._encode(x)
        views = [x, x.flip(-1)]
        if self.average == "crops":
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


def with_average(net: nn.Module, size: tuple[int, int], average: Average) -> MultiCropEncoder:
    """An encoder that averages otherwise, of the same weights; `size` is of the images, for one that has no own."""
    if isinstance(net, MultiCropEncoder):
        return MultiCropEncoder(net.net, net.size, average)
    return MultiCropEncoder(net, size, average)
