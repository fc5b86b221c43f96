"""Types shared by data sources, readers and training.

Notation: B episodes per step, M data points per episode, K ways, S shots, Q queries per class, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the command line imports this module, and `--help` does not need NumPy
    import numpy as np


class DataError(ValueError):
    """Wrong data or a wrong request. The message is one line: what, where, remedy."""


def printable(text: str) -> str:
    """Escape control characters of a name from outside (file, class, URI, key), so that a terminal does not obey them.

    Letters of all scripts stay as they are; escape sequences, line breaks, direction marks and bytes that are not
    UTF-8 become `\\x1b`, `\\n`, `\\u202e`, `\\udcff`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class WorkError(RuntimeError):
    """The request was right, but the work failed. The message is one line."""


class NoSpaceError(WorkError, DataError):
    """A disk is full. Also a `DataError`, so that whoever handles an output that cannot be written handles it too."""


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data source, decoded on demand."""

    key: str
    """Unique within the source and equal on all machines: path inside the source, plus the variant (a rotation)."""
    class_name: str
    """Empty if the source has no classes."""
    load: Callable[[], np.ndarray]
    """Decodes the image: uint8, (C, H, W), in the size of the dataset."""
    read: Callable[[], bytes] | None = None
    """Content of the image file; None if the image has no file of its own."""
    group: str = ""
    """What it shares with other images, such as the patient; empty if the source has no groups."""


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
    """Unlabelled sets of one training step on one rank."""

    images: Any
    """uint8 images, (b, M, C, H, W), or float features, (b, M, F), b = B / world size; NumPy arrays, or tensors
    on a device."""
    episodes: np.ndarray
    """int64, (b,): global episode indices, from which all random numbers of the step are derived."""
    step: int


@dataclass(frozen=True)
class TaskBatch:
    """Few-shot tasks of one training step on one rank."""

    images: Any
    """uint8 images, (b, K, n, C, H, W), or float features, (b, K, n, F), of b tasks with K classes of n images."""
    tasks: np.ndarray
    """int64, (b,): global task indices, from which all random numbers of the step are derived."""
    step: int


@dataclass(frozen=True)
class Episode:
    """Row indices of one labelled K-way S-shot episode in a split."""

    index: int
    classes: np.ndarray
    """int64, (K,): class ids; label k of the episode is class classes[k]."""
    support: np.ndarray
    """int64, (K, S): row indices."""
    query: np.ndarray
    """int64, (K, Q): row indices."""
    others: np.ndarray | None = None
    """int64, (N,): classes for queries without labelled images, drawn with the groups; None: not drawn."""


MapTasks = Callable[[Callable[..., object], Sequence[tuple[object, ...]]], Iterable[object]]
"""Calls a function with each tuple of arguments and returns the results in order, for example as Ray tasks
(`infra.cluster.tasks`)."""

ProgressCallback = Callable[[int, int], None]
"""Called with (done, total) as work progresses."""
ProgressBar = Callable[[str], AbstractContextManager[ProgressCallback | None]]
"""Opens a progress bar with a title. The context yields None if no bar is shown."""


def no_progress(title: str) -> AbstractContextManager[ProgressCallback | None]:
    """A `ProgressBar` that shows nothing."""
    return nullcontext()


def first_few(items: Sequence[str], separator: str = ", ", shown: int = 3) -> str:
    """The first items and the number of the others, for messages: "a, b, c and 5 more"."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(items[:shown]) + more
