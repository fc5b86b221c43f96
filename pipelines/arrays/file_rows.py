"""Rows of numbers in a file, mapped into memory: they are read where they are used, and a worker maps them again."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metagmvae.pipelines.files import reading
from metagmvae.pipelines.records import DataError, WorkError

Order = Literal["C", "F"]


@dataclass(frozen=True)
class FileRows:
    """An array (n, F) inside a file, read by row indices."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    """Bytes before the array."""
    order: Order = "C"
    stamp: tuple[int, int] = (0, 0)
    """Inode and time stamp: a file that was replaced is mapped again."""

    @classmethod
    def open(
        cls, path: str | Path, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0, order: Order = "C"
    ) -> FileRows:
        """Rows of a file whose size has been compared with them.

        Raises:
            DataError: the file is shorter.
        """
        path = os.path.abspath(path)
        with reading(path):
            status = os.stat(path)
        needed = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if status.st_size < needed:
            raise DataError(f"{path}: has {status.st_size:,} bytes, but {needed:,} are needed; copy it again")
        return cls(path, shape, dtype.str, offset, order, (status.st_ino, status.st_mtime_ns))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        if not all(self.shape):  # nothing can be mapped
            return np.empty(self.shape, self.dtype)[rows]
        return np.asarray(_map(self.path, self.shape, self.dtype, self.offset, self.order, self.stamp)[rows])


@lru_cache(maxsize=64)
def _map(path: str, shape: tuple[int, ...], dtype: str, offset: int, order: Order, stamp: tuple[int, int]) -> np.memmap:
    with reading(path):
        return np.memmap(path, np.dtype(dtype), "r", offset, shape, order)


@contextmanager
def unpacking(path: str | Path) -> Iterator[Path]:
    """Yield a new file in a temporary folder to unpack a file into; see `remove_unpacked`.

    Args:
        path: the file that is read, for messages.

    Raises:
        WorkError: the disk with the temporary folder is full. The folder is deleted, as after other errors.
    """
    folder = Path(tempfile.mkdtemp(prefix="metagmvae-"))
    try:
        yield folder / "rows"
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        where = f"cannot be unpacked into {tempfile.gettempdir()} ({error.strerror})"
        raise WorkError(f"{path}: {where}; set TMPDIR to a disk with space") from error


def remove_unpacked(target: Path) -> None:
    """Delete a file of `unpacking` with its folder."""
    shutil.rmtree(target.parent, ignore_errors=True)


def unpack_rows(path: str | Path, blocks: Iterator[np.ndarray]) -> FileRows:
    """Write blocks of rows, (m, F) each, one after the other into a temporary file, and return the rows of it.

    For files that can only be read from the beginning to the end. The memory holds one block. The file is deleted with
    the returned object, or at the end of the process.

    Args:
        path: the file that is read, for messages.
        blocks: at least one, all with the same F and number format.

    Raises:
        WorkError: the disk with the temporary folder is full.
    """
    count = 0
    with unpacking(path) as target:
        with open(target, "wb") as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block).tobytes())
                count += len(block)
        rows = FileRows.open(target, (count, *block.shape[1:]), block.dtype)
    weakref.finalize(rows, _remove, target)
    return rows


def _remove(target: Path) -> None:
    _map.cache_clear()  # a mapped file would keep its place on the disk
    remove_unpacked(target)
