"""Plain types that cross a boundary between stages.

Notation: B episodes per step, M points per episode, K ways, S shots, Q queries per class, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class DataError(ValueError):
    """The data or the request about it is wrong: one line that names what, where and the remedy."""


@dataclass(frozen=True)
class ImageRecord:
    """One source image, decoded on demand."""

    key: str
    """Unique within the source, stable between machines: a path inside the source, plus its variant."""
    class_name: str
    """Empty where the source has no classes."""
    load: Callable[[], np.ndarray]
    """Decode to uint8, (C, H, W), at the size that the data set asks for."""


class Rows(Protocol):
    """Images (n, C, H, W) or features (n, F) of a split, read by row indices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, C, H, W) or (n, F)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> Any:
        """Rows at these indices, int64 (m,): a NumPy array, or a torch tensor where the rows are on a device."""


@dataclass(frozen=True)
class SetBatch:
    """Unlabelled sets for one training step on one rank."""

    images: Any
    """uint8 images, (b, M, C, H, W), or float features, (b, M, F), b = B / world size; on the host or on a device."""
    episodes: np.ndarray
    """int64, (b,): global episode indices; all randomness of the step derives from them."""
    step: int


@dataclass(frozen=True)
class Episode:
    """One labelled K-way S-shot episode as row numbers of a split."""

    index: int
    classes: np.ndarray
    """int64, (K,): class ids; label k is classes[k]."""
    support: np.ndarray
    """int64, (K, S) rows."""
    query: np.ndarray
    """int64, (K, Q) rows."""


MapTasks = Callable[[Callable[..., object], Sequence[tuple[object, ...]]], Iterable[object]]
"""Run a function over argument tuples, results in order: in-process, or as Ray tasks (`infra.cluster.tasks`)."""


ProgressCallback = Callable[[int, int], None]
"""Told (done, total) as work goes on."""
ProgressBar = Callable[[str], AbstractContextManager[ProgressCallback | None]]
"""Opens a progress bar with a title; yields None where none is shown."""


def no_progress(title: str) -> AbstractContextManager[ProgressCallback | None]:
    """A progress bar that is not shown."""
    return nullcontext()
