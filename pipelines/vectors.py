"""Feature vectors that a user computed elsewhere: images of F channels and one pixel for the encoder `vectors`.

That encoder returns them as they are, so a dataset of vectors is one of features whose encoder needs no files.
"""

from __future__ import annotations

import hashlib

import numpy as np

VECTORS = "vectors"
"""Name of the encoder, and of the source of `metagmvae prepare`."""


def vector_shape(size: int) -> tuple[int, int, int]:
    """Image shape (C, H, W) of vectors of F values: (F, 1, 1)."""
    return (size, 1, 1)


def vector_digest(size: int) -> str:
    """sha256 that stands for the encoder of vectors of F values, which has no weights."""
    return hashlib.sha256(f"vectors {size};".encode()).hexdigest()


def convert(values: np.ndarray, dtype: str) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Vectors (n, F) in another number format, and row and column of the first value that is not finite in it."""
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    if np.isfinite(converted).all():
        return converted, None
    row, column = np.argwhere(~np.isfinite(converted))[0]
    return converted, (int(row), int(column))


def describe_shape(shape: tuple[int, ...], *, vectors: bool) -> str:
    """What a dataset holds or a model takes, for messages: `vectors of 512 values`, or `images (3, 84, 84)`."""
    return f"vectors of {shape[0]} values" if vectors else f"images {tuple(shape)}"


def image_remedy(content: str) -> str:
    """What to do where a dataset of images is needed and another one is given (`Dataset.content`), for messages."""
    return f"{'prepare' if content == VECTORS else 'use the dataset of'} the images"
