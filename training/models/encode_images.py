"""Features of many images, for evaluation and for meta-training on frozen features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from metagmvae.pipelines.records import DataError, Rows
from metagmvae.pipelines.vectors import convert
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.device.memory_format import channels_last as in_channels_last
from metagmvae.training.device.precision import Precision, autocast
from metagmvae.training.device.seeding import to_device
from metagmvae.training.models.encoders import EncoderModel

SMALLEST_BATCH = 4
"""Smaller batches are padded: for them the libraries use other kernels, whose rounding differs. The features of an
image then do not depend on how many others are encoded with it (on a CPU bit for bit)."""


def vectors_as_images(model: EncoderModel, vectors: np.ndarray, name: str) -> np.ndarray:
    """Vectors (n, F) as a model that takes vectors has them, float32 (n, F, 1, 1).

    Args:
        model: the model.
        vectors: finite numbers of any format.
        name: of the vectors, for messages.

    Raises:
        DataError: they have another shape, are no numbers, or a value is not finite in float32.
    """
    size = model.image_shape[0]
    if vectors.ndim != 2 or vectors.shape[1] != size or vectors.dtype.kind not in "iuf":
        takes = f"the model takes vectors of {size} values"
        raise DataError(f"{name}: holds {vectors.dtype} {vectors.shape}, and {takes}")
    rounded, wrong = convert(vectors, "float32")
    if wrong is not None:
        row, column = wrong
        value = vectors[row, column]
        raise DataError(f"{name}: value {column} of vector {row} is {value}; give finite numbers up to 3e38")
    return rounded.reshape(-1, *model.image_shape)


@torch.inference_mode()
def encode_images(
    model: EncoderModel,
    images: Rows,
    device: torch.device,
    batch: int = 512,
    *,
    raw: bool = False,
    view: Callable[[Tensor], Tensor] | None = None,
    channels_last: bool = True,
    precision: Precision = "float32",
    to: torch.device | None = None,
) -> Tensor:
    """Encode images in evaluation mode, in batches: uint8 (n, C, H, W) -> features (n, F).

    On a CPU the process keeps freed memory from then on (`training.device.allocator`): twice as fast.

    Args:
        model: the model, already on `device`.
        images: read by row indices, also a NumPy array.
        device: where the model runs.
        batch: images per forward pass.
        raw: return the features of the encoder as float32, instead of `model.scale_features` of them.
        view: encode this view of the images instead, (n, C, H, W) in [0, 1] -> the same; None: the images.
        channels_last: memory format of the images.
        precision: of the networks, as `train.precision`. Features for evaluation are always computed in float32, so
            that they are the same on every machine.
        to: device of the result; None: `device`.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model.eval()
    encode = model.encoder if raw else model.encode_images
    pieces = []
    for first in range(0, len(images), batch):
        rows = np.arange(first, min(first + batch, len(images)))
        count = len(rows)
        rows = np.resize(rows, max(count, SMALLEST_BATCH))
        x = model.scale_images(to_device(images[rows], device))
        if view is not None:
            x = view(x)
        if channels_last:
            x = in_channels_last(x)
        with nullcontext() if precision == "float32" else autocast(device, precision):
            h = encode(x)[:count]
        pieces.append((h.float() if raw else h).to(to or device))
    return torch.cat(pieces)
