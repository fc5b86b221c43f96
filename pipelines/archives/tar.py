"""Members of a tar by name, without unpacking it to files.

A tar has no directory: it is read once from end to end, and where each member lies is kept. A compressed tar cannot be
read out of order, so its content is spooled, once per process, to a temporary file that has no name any more.
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
    """Where a file lies in the (uncompressed) tar."""

    entry: Entry
    offset: int


@dataclass(frozen=True)
class OpenTar:
    """A tar, or its spooled content, with all its files by name."""

    file: IO[bytes]
    members: dict[str, Member]

    def __del__(self) -> None:
        self.file.close()


def is_tar(path: Path) -> bool:
    """By its name: the first bytes of an old tar say nothing."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def tar_entries(path: Path) -> list[Entry]:
    """All files of a tar.

    Raises:
        DataError: it is damaged or unsafe.
    """
    return [member.entry for member in _open(path).members.values()]


def read_member(path: Path, name: str) -> bytes:
    """The bytes of one file.

    Raises:
        KeyError: there is none of this name.
        DataError: the tar is damaged or unsafe.
    """
    tar = _open(path)
    member = tar.members[name]
    return os.pread(tar.file.fileno(), member.entry.size, member.offset)


def _open(path: Path) -> OpenTar:
    status = path.stat()
    return _opened(str(path), status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=4)
def _opened(path: str, size: int, modified_ns: int, process: int) -> OpenTar:
    """Opened once per process; a file handle inherited by a fork would be the same one."""
    try:
        tar = OpenTar(_content(path, size), {})
        tar.members.update(_members(path, tar.file))
        return tar
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: not a whole tar file ({error}); fetch it again") from error


def _content(path: str, size: int) -> IO[bytes]:
    """The tar itself, or its uncompressed content in a file without a name."""
    if path.lower().endswith(".tar"):
        return open(path, "rb")
    left = min(MAX_TOTAL_BYTES, MAX_RATIO * max(size, RATIO_FREE_BYTES))
    spool = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
    with _decompressed(path) as source:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise DataError(f"{path}: {size} bytes that unpack to far more than pictures do; refused")
            _spool(spool, chunk, path)
    _spool(spool, b"", path)
    spool.seek(0)
    return spool


def _spool(spool: IO[bytes], chunk: bytes, path: str) -> None:
    try:
        spool.write(chunk)
        spool.flush()
    except OSError as error:
        # The tar is whole: to fetch it again would not help. Closing tries to write the rest once more.
        with suppress(OSError):
            spool.close()
        raise DataError(
            f"{path}: its content finds no room in {tempfile.gettempdir()} ({error.strerror}); make some, or set TMPDIR"
        ) from error


def _decompressed(path: str) -> IO[bytes]:
    name = path.lower()
    if name.endswith("gz"):
        return cast(IO[bytes], gzip.open(path))
    return cast(IO[bytes], bz2.open(path) if name.endswith("bz2") else lzma.open(path))


def _members(path: str, file: IO[bytes]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    seen: set[PurePosixPath] = set()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            name = info.name.removeprefix("./")
            if info.isdir():
                continue
            check_name(name, path)
            if not info.isreg():
                raise DataError(f"{path}: member {name!r} is a link or a device; refused")
            check_size(name, info.size, path)
            if PurePosixPath(name) in seen:
                raise DataError(f"{path}: two members are named {name!r}; pack it again")
            seen.add(PurePosixPath(name))
            if info.issparse():
                raise DataError(f"{path}: member {name!r} is sparse; pack it again")
            content = os.pread(file.fileno(), info.size, info.offset_data)
            if len(content) != info.size:
                raise DataError(f"{path}: {name} holds {len(content)} of {info.size} bytes; fetch the file again")
            members[name] = Member(Entry(name, zlib.crc32(content), info.size), info.offset_data)
    return members
