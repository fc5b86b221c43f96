"""Shards of encoded images: one JPEG or WebP member for each row, decoded when the row is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.blocks import row_indices, tar_members
from metagmvae.pipelines.shards.image_codec import SUFFIXES, decode_member
from metagmvae.pipelines.shards.manifest import REMEDY

STREAMED_ROWS = 512
"""Rows that are decoded at once when a shard is read from its beginning."""
LEAST_ROWS = 16
"""Rows that are worth a thread."""


class Members(NamedTuple):
    """The images of a shard."""

    offsets: np.ndarray
    """int64 (rows,): where each file begins, in bytes from the start of the tar file."""
    sizes: np.ndarray
    """int64 (rows,): in bytes."""
    formats: Counter[str]
    """Number of images by suffix, without the dot."""


def image_members(file: IO[bytes], name: str | Path) -> Members:
    """Images of a shard, of which only the tar headers are read.

    Args:
        file: the tar file, which can be read at any position.
        name: of the shard, for messages; it ends with the name of its file.

    Raises:
        DataError: the tar file is truncated, or has other members than the images in the order of their rows.
    """
    stem = Path(name).stem
    offsets, sizes, formats = [], [], Counter[str]()
    for row, (member, offset, size) in enumerate(tar_members(file, name)):
        key, dot, suffix = member.partition(".")
        if key != member_key(stem, row) or dot + suffix not in SUFFIXES:
            expected = f"{member_key(stem, row)}.* ({' '.join(SUFFIXES)})"
            raise DataError(f"{name}: member {member!a} instead of {expected}; {REMEDY}")
        offsets.append(offset)
        sizes.append(size)
        formats[suffix] += 1
    return Members(np.array(offsets, np.int64), np.array(sizes, np.int64), formats)


def member_key(shard: str, row: int) -> str:
    """Name of the member of a row without its suffix; `row` counts from the beginning of the shard."""
    return f"{shard}-{row:06d}"


class EncodedShard(NamedTuple):
    """Consecutive images of one shard."""

    name: str | Path
    """Of the shard, for messages."""
    data: memoryview
    """The tar file, or a part of it."""
    offsets: np.ndarray
    """int64 (rows,), from the beginning of `data`."""
    sizes: np.ndarray
    first: int = 0
    """Row of the shard that is the first one here."""


class EncodedRows:
    """Images of a split, decoded when they are read: `rows[indices] -> uint8 (n, C, H, W)`.

    Many rows are decoded by as many threads as this process has processors.
    """

    def __init__(self, shards: Sequence[EncodedShard], image_shape: tuple[int, ...]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(len(shard.offsets) for shard in shards)])
        self.shape = (int(self.starts[-1]), *image_shape)
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = row_indices(rows, len(self))
        flat = np.atleast_1d(rows)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        pieces = np.array_split(np.arange(len(flat)), min(4 * _processors(), max(len(flat) // LEAST_ROWS, 1)))
        decode = partial(self._decode, flat, out)
        if len(pieces) == 1:
            decode(pieces[0])
        else:
            list(_threads(os.getpid()).map(decode, pieces))
        return out if np.ndim(rows) else out[0]

    def content(self, row: int) -> bytes:
        """The image file of one row."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return _content(self.shards[number], row - int(self.starts[number]))

    def _decode(self, rows: np.ndarray, out: np.ndarray, positions: np.ndarray) -> None:
        """Decode the rows at some positions.

        Raises:
            DataError: naming shard and member.
        """
        shards = np.searchsorted(self.starts, rows[positions], side="right") - 1
        for position, number in zip(positions, shards, strict=True):
            shard, row = self.shards[number], int(rows[position] - self.starts[number])
            try:
                out[position] = decode_member(_content(shard, row), self.shape[1:])
            except ValueError as error:
                member = member_key(Path(shard.name).stem, shard.first + row)
                raise DataError(f"{shard.name}: member {member}: {error}; {REMEDY}") from error


def _content(shard: EncodedShard, row: int) -> bytes:
    start = int(shard.offsets[row])
    return bytes(shard.data[start : start + int(shard.sizes[row])])


def stream_images(
    file: IO[bytes], name: str | Path, members: Members, image_shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """All images of an open shard in their order, decoded in pieces: uint8 (n, C, H, W).

    Raises:
        DataError: an image cannot be decoded.
    """
    for first in range(0, len(members.offsets), STREAMED_ROWS):
        offsets, sizes = (column[first : first + STREAMED_ROWS] for column in members[:2])
        file.seek(offsets[0])
        data = memoryview(file.read(int(offsets[-1] + sizes[-1] - offsets[0])))
        yield EncodedRows([EncodedShard(name, data, offsets - offsets[0], sizes, first)], image_shape)[:]


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(_processors(), thread_name_prefix="decode")
