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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

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
        for member, offset, size in _tar_members(file, name)
        if member.endswith(BLOCK)
    ]


def _tar_members(file: IO[bytes], name: str | Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of the files in a tar file."""
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
