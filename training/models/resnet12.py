"""ResNet-12, the usual residual encoder of few-shot learning (Oreshkin et al., NeurIPS 2018; Lee et al., CVPR 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.training.models.normalisation import ImageNetNormalisation

WIDTHS = (64, 160, 320, 640)
"""Channels of the four blocks."""


class ResNet12(nn.Module):
    """Four residual blocks and a global average: images (n, 3, H, W) in [0, 1] -> features (n, 640).

    Grey images are repeated to three channels. The names of the weights are those of the published implementations of
    MetaOptNet (Lee et al., CVPR 2019) and of RFS (Tian et al., ECCV 2020). DropBlock, their regularisation in
    supervised training, has no weights and is left out.

    Args:
        image_shape: (C, H, W), each side of at least 16 pixels.
        normalise: normalise by the colour statistics of ImageNet first.
    """

    def __init__(self, image_shape: tuple[int, int, int], normalise: bool = False) -> None:
        super().__init__()
        if image_shape[0] not in (1, 3):
            raise ValueError(f"takes images of 1 or 3 channels, not {image_shape[0]}")
        if min(image_shape[1:]) < 2 ** len(WIDTHS):
            raise ValueError(f"images of {image_shape[1:]} are too small for 4 poolings; set model.image_size")
        self.normalise = ImageNetNormalisation() if normalise else nn.Identity()
        for number, (before, after) in enumerate(zip((3, *WIDTHS[:-1]), WIDTHS, strict=True), start=1):
            self.add_module(f"layer{number}", nn.Sequential(ResidualBlock(before, after)))
        self.feature_dim = WIDTHS[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        h = self.normalise(x.expand(-1, 3, -1, -1))
        for number in range(1, len(WIDTHS) + 1):
            h = self.get_submodule(f"layer{number}")(h)
        return h.mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch normalisation, a 1x1 convolution around them, and a 2x2 max pooling."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv3 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        h = F.leaky_relu(self.bn2(self.conv2(h)), 0.1)
        h = self.bn3(self.conv3(h)) + self.downsample(x)
        return F.max_pool2d(F.leaky_relu(h, 0.1), 2)
