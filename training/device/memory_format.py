"""The channels-last memory format of images, also for one channel."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(images: Tensor) -> Tensor:
    """The same images, (n, C, H, W), in channels-last memory.

    With one channel both formats have the same bytes, and PyTorch takes the images for channels-first, by their
    strides. A first convolution then writes its maps channels-first, and its pooling is slow: a training step of Conv4
    took twice as long. Here the strides say channels-last.
    """
    if images.shape[1] != 1:
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous().reshape(-1, *images.shape[2:], 1).permute(0, 3, 1, 2)
