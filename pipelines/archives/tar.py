"""Reads members of a tar file by name, without unpacking it to files.

A tar file has no directory: it is read once, and the offsets of its members are kept. A compressed one allows no random
access, so its uncompressed content is copied once per process to an unnamed temporary file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, cast

from metagmvae.pipelines.archives.entries import (
    MAX_RATIO,
    MAX_TOTAL_BYTES,
    RATIO_FREE_BYTES,
    Entry,
    check_name,
    check_size,
)
from metagmvae.pipelines.records import DataError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
CHUNK_BYTES = 2**20
DAMAGE = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


@dataclass(frozen=True)
class Member:
    """One file, and its offset in the uncompressed tar file in bytes."""

    entry: Entry
    offset: int


@dataclass(frozen=True)
class OpenTar:
    """An open tar file, or the temporary file with its content, and its members by name."""

    file: IO[bytes]
    members: dict[str, Member]

    def __del__(self) -> None:
        self.file.close()


def is_tar(path: Path) -> bool:
    """Whether the file name is that of a tar file; old tar files cannot be recognised by their content."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def tar_entries(path: Path) -> list[Entry]:
    """All files of a tar file.

    Raises:
        DataError: the tar file is damaged or unsafe.
    """
    return [member.entry for member in _open(path).members.values()]


def read_member(path: Path, name: str) -> bytes:
    """Content of one file.

    Raises:
        KeyError: there is no file of this name.
        DataError: the tar file is damaged or unsafe.
    """
    tar = _open(path)
    member = tar.members[name]
    return os.pread(tar.file.fileno(), member.entry.size, member.offset)


def _open(path: Path) -> OpenTar:
    status = path.stat()
    return _open_once(str(path), status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=4)
def _open_once(path: str, size: int, modified_ns: int, process: int) -> OpenTar:
    """Open a tar file once per process; a fork must not use the file handle that it inherits."""
    try:
        tar = OpenTar(_content(path, size), {})
        tar.members.update(_members(path, tar.file))
        return tar
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: not a complete tar file ({error}); download it again") from error


def _content(path: str, size: int) -> IO[bytes]:
    """The tar file itself, or its uncompressed content in an unnamed temporary file."""
    if path.lower().endswith(".tar"):
        return open(path, "rb")
    remaining = min(MAX_TOTAL_BYTES, MAX_RATIO * max(size, RATIO_FREE_BYTES))
    spool = tempfile.TemporaryFile()  # noqa: SIM115, used until the process ends
    with _decompressed(path) as source:
        while chunk := source.read(CHUNK_BYTES):
            remaining -= len(chunk)
            if remaining < 0:
                raise DataError(f"{path}: {size} bytes unpack to more than {MAX_RATIO} times their size; refused")
            _spool(spool, chunk, path)
    _spool(spool, b"", path)
    spool.seek(0)
    return spool


def _spool(spool: IO[bytes], chunk: bytes, path: str) -> None:
    try:
        spool.write(chunk)
        spool.flush()
    except OSError as error:
        # The disk is full, the tar file is not damaged. Closing tries to write the buffer again.
        with suppress(OSError):
            spool.close()
        raise DataError(
            f"{path}: cannot be unpacked to {tempfile.gettempdir()} ({error.strerror}); free some space, or set TMPDIR"
        ) from error


def _decompressed(path: str) -> IO[bytes]:
    name = path.lower()
    if name.endswith("gz"):
        return cast(IO[bytes], gzip.open(path))
    return cast(IO[bytes], bz2.open(path) if name.endswith("bz2") else lzma.open(path))


def _members(path: str, file: IO[bytes]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    names: set[PurePosixPath] = set()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            name = info.name.removeprefix("./")
            if info.isdir():
                continue
            check_name(name, path)
            if not info.isreg():
                raise DataError(f"{path}: member {name!r} is a link or a device; refused")
            check_size(name, info.size, path)
            if PurePosixPath(name) in names:
                raise DataError(f"{path}: two members are named {name!r}; pack the archive again")
            names.add(PurePosixPath(name))
            if info.issparse():
                raise DataError(f"{path}: member {name!r} is sparse; pack the archive again")
            content = os.pread(file.fileno(), info.size, info.offset_data)
            if len(content) != info.size:
                raise DataError(f"{path}: {name} has {len(content)} of {info.size} bytes; download the file again")
            members[name] = Member(Entry(name, zlib.crc32(content), info.size), info.offset_data)
    return members
