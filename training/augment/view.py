"""The type of a view: a random augmentation of a batch of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

View = Callable[[Tensor, torch.Generator], Tensor]
"""(n, C, H, W) images in [0, 1] and a generator -> one random view of each image, float in [0, 1]."""
