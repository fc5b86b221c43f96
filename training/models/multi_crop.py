"""Resizing of images to the encoder's input size, and averaging of features over views (test-time augmentation)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import Average
from metagmvae.training.device.memory_format import channels_last

CROP = 0.85
"""Side of a crop, as a fraction of the image's side."""
ROTATION = math.radians(10)
"""Angle of the views of `affine`."""
SHIFT = 1 / 28
"""Shift of the views of `affine` along each side, as a fraction of it: one pixel of Omniglot's images."""
INNER = "net."
"""Prefix of the weights of the wrapped network among the modules of `MultiCropEncoder`."""


class MultiCropEncoder(nn.Module):
    """Resizes images to `size` (bilinear, antialiased) and encodes them: (n, C, H, W) -> (n, F).

    In evaluation mode the features are the mean over several views of each image (10-crop testing, Krizhevsky et al.,
    NeurIPS 2012). `mirror`: the image and its horizontal flip. `crops`: these two, and the four corner crops and the
    centre crop with their flips, 12 views. `affine`: the image and four views shifted towards the corners and rotated,
    for strokes on a black background (`affine_views`). In training mode each image is encoded once.

    The state dict is that of `net`: neither resizing nor averaging is part of the weights. Names of weights that begin
    with `net.`, as older versions wrote them, are read too.

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
        self.register_state_dict_post_hook(_without_wrapper)
        self.register_load_state_dict_pre_hook(_with_wrapper)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.averaging == "none":
            return self._encode(x)
        views = [x, *(affine_views(x) if self.averaging == "affine" else [x.flip(-1)])]
        if self.averaging == "crops":
            from torchvision.transforms.v2.functional import ten_crop

            views += ten_crop(x, [round(CROP * side) for side in x.shape[-2:]])
        total = self._encode(views[0])
        for view in views[1:]:
            total = total + self._encode(view)
        return total / len(views)

    def _encode(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        return self.net(x)


def affine_views(x: Tensor) -> list[Tensor]:
    """Four views of each image, (n, C, H, W) -> 4 times the same shape; black (0) outside of the image.

    Each samples the image (bilinear) at coordinates that are rotated about its centre by `ROTATION`, in alternate
    directions, and shifted by `SHIFT` towards one corner.
    """
    views = []
    for right in (1, -1):
        for down in (1, -1):
            # Coordinates are in units of half the side; the rotation is one in pixels, also for oblong images.
            angle, ratio = ROTATION * right * down, x.shape[-2] / x.shape[-1]
            rows = [
                [math.cos(angle), -math.sin(angle) * ratio, 2 * SHIFT * right],
                [math.sin(angle) / ratio, math.cos(angle), 2 * SHIFT * down],
            ]
            grid = F.affine_grid(x.new_tensor(rows).expand(len(x), 2, 3), list(x.shape), align_corners=False)
            view = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            views.append(channels_last(view))
    return views


def _without_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give the weights the names that they have in the wrapped network."""
    inner = f"{prefix}{INNER}"
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _with_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `_without_wrapper` before loading; names of older versions stay as they are."""
    assert isinstance(module, MultiCropEncoder)
    for name in module.net.state_dict():
        if f"{prefix}{INNER}{name}" not in state and prefix + name in state:
            state[f"{prefix}{INNER}{name}"] = state.pop(prefix + name)
