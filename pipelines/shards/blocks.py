"""The blocks of a shard: where the `.npy` members of a tar file begin, and the shape and type of each.

Only headers are read. Every size that they state is compared with the bytes of the file, so that a damaged or hostile
shard is refused before anything is allocated. Python's `tarfile` is used for the fields of a header only: it would
follow negative sizes, links and sparse files.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from metagmvae.pipelines.files import first_line
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.manifest import REMEDY

BLOCK = ".x.npy"
"""End of the names of the members that contain rows."""
SKIPPED_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE)
"""Members with further attributes (pax headers), which are not needed."""
MAX_HEADER = 4096
"""Bytes of a member in which the NumPy header must end; those of this program have 128."""


class Block(NamedTuple):
    """Rows of a shard."""

    offset: int
    """Of the first value, in bytes from the start of the tar file."""
    shape: tuple[int, ...]
    """(rows, *shape of a row)."""
    dtype: str


class MappedRows:
    """Rows of a split, mapped from its tar files: `rows[indices] -> (n, C, H, W)` or `(n, F)`."""

    def __init__(self, blocks: list[np.ndarray]) -> None:
        self.blocks = blocks
        self.starts = np.cumsum([0, *(len(block) for block in blocks)])
        self.shape = (int(self.starts[-1]), *blocks[0].shape[1:])
        self.dtype = blocks[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = row_indices(rows, len(self))
        flat = np.atleast_1d(rows)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        block_of_row = np.searchsorted(self.starts, flat, side="right") - 1
        for block in np.unique(block_of_row):
            in_block = block_of_row == block
            out[in_block] = self.blocks[block][flat[in_block] - self.starts[block]]
        return out if np.ndim(rows) else out[0]


def row_indices(rows: Any, count: int) -> np.ndarray:
    """Indices from 0 of what selects some of `count` rows as it would in a NumPy array: a slice, indices, a mask.

    Raises:
        IndexError: there is no such row.
    """
    indices = None if isinstance(rows, slice) else np.asarray(rows)
    if indices is None or indices.dtype.kind != "i":
        return np.arange(count)[rows]
    if indices.size and (indices.min() < -count or indices.max() >= count):
        raise IndexError(f"row {indices.min() if indices.min() < -count else indices.max()} of {count:,} rows")
    return np.where(indices < 0, indices + count, indices)


def shard_blocks(file: IO[bytes], name: str | Path) -> list[Block]:
    """Blocks of a shard.

    Args:
        file: the tar file, which can be read at any position.
        name: of the shard, for messages.

    Raises:
        DataError: the tar file is truncated or has members of another kind, or a block is not an array of plain
            numbers of exactly the stated size.
    """
    return [
        _npy_block(file, offset, size, f"{name}: {member!a}")
        for member, offset, size in tar_members(file, name)
        if member.endswith(BLOCK)
    ]


def block_positions(blocks: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Offset and size in bytes of each row of some blocks, int64 (rows,)."""
    sizes = [math.prod(block.shape[1:]) * np.dtype(block.dtype).itemsize for block in blocks]
    offsets = [
        block.offset + size * np.arange(block.shape[0], dtype=np.int64)
        for block, size in zip(blocks, sizes, strict=True)
    ]
    rows = [block.shape[0] for block in blocks]
    return np.concatenate([np.empty(0, np.int64), *offsets]), np.repeat(np.array(sizes, np.int64), rows)


def tar_members(file: IO[bytes], name: str | Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of the files in a tar file.

    Raises:
        DataError: it is truncated, or has members of another kind.
    """
    end, position = file.seek(0, os.SEEK_END), 0
    while position < end:
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if not any(header):  # blocks of zeros end the archive
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(f"{name}: no tar header at byte {position:,} ({first_line(error)}); {REMEDY}") from error
        start = position + tarfile.BLOCKSIZE
        if member.size < 0 or start + member.size > end:
            raise DataError(f"{name}: {member.name!a} states {member.size:,} bytes, more than there are; {REMEDY}")
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member.name, start, member.size
        elif member.type not in SKIPPED_TYPES:
            raise DataError(f"{name}: {member.name!a} is not a file; {REMEDY}")
        position = start + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _npy_block(file: IO[bytes], offset: int, size: int, name: str) -> Block:
    file.seek(offset)
    header = io.BytesIO(file.read(min(size, MAX_HEADER)))
    try:
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise DataError(f"{name} is a NumPy array of format {version}, not 1.0; {REMEDY}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header, MAX_HEADER)
    except DataError:
        raise
    except Exception as error:  # the header is a Python literal, whose parser raises many types
        raise DataError(f"{name} is not a NumPy array ({first_line(error)}); {REMEDY}") from error
    if fortran or dtype.hasobject or not shape or min(shape) < 1:
        raise DataError(f"{name} is not a C-ordered array of numbers; {REMEDY}")
    stated = math.prod(shape) * dtype.itemsize
    if header.tell() + stated != size:
        raise DataError(f"{name} states {shape[0]:,} rows, {stated:,} bytes, but has {size:,} bytes; {REMEDY}")
    return Block(offset + header.tell(), shape, dtype.str)
