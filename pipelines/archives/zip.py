"""Reads members of a zip file by name, without unpacking it to files."""

from __future__ import annotations

import io
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from metagmvae.pipelines.archives.entries import (
    MAX_RATIO,
    MAX_TOTAL_BYTES,
    RATIO_FREE_BYTES,
    Entry,
    Kind,
    check_name,
    check_size,
)
from metagmvae.pipelines.archives.formats import XZ_MEMORY_BYTES
from metagmvae.pipelines.records import DataError

UTF8_FLAG = 0x800
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
LOCAL_HEADER_BYTES = 30
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
    MemoryError,
)
"""Exceptions of `zipfile` and its decompressors on damaged data or unknown compression methods."""


class ZipFiles:
    """The files of a zip file. Every member is checked before it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> Iterator[tuple[str, Kind]]:
        """See `FileTree`."""
        for info in _checked_members(str(self.path), *_identity(self.path)):
            yield info.filename.rstrip("/"), _kind(info)

    def entry(self, name: str) -> Entry:
        """See `FileTree`."""
        info = self._info(name)
        return Entry(name, info.CRC, info.file_size)

    def open(self, name: str) -> IO[bytes]:
        """See `FileTree`."""
        return io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        """See `FileTree`.

        Raises:
            DataError: the member is damaged or unsafe.
        """
        info = self._info(name)
        check_member(info, str(self.path))
        try:
            _check_dictionary(self.path, info)
            # Limits the unpacked size of a member whose stated size is wrong; one byte more than stated detects it.
            with self._archive.open(info) as member:
                data = member.read(info.file_size + 1)
        except DAMAGE as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: {name} cannot be read ({error}); download the file again") from error
        if len(data) != info.file_size:
            sizes = f"{len(data)} of {info.file_size} bytes"
            raise DataError(f"{self.path}: {name} has {sizes}; download the file again")
        return data

    @property
    def _archive(self) -> zipfile.ZipFile:
        return _open_zip(str(self.path), *_identity(self.path), os.getpid())

    def _info(self, name: str) -> zipfile.ZipInfo:
        return self._archive.getinfo(name)


def check_member(info: zipfile.ZipInfo, archive: str) -> None:
    """Refuse a member that points outside the archive, is encrypted, or is too large.

    Raises:
        DataError: with the names of the archive and the member.
    """
    name = info.filename
    check_name(name, archive)
    if info.flag_bits & 1:
        raise DataError(f"{archive}: member {name!r} is encrypted; pack the archive without a password")
    if info.compress_type not in METHODS:
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)  # type: ignore[attr-defined]
        raise DataError(f"{archive}: member {name!r} is compressed by {method}; pack the archive again with deflate")
    check_size(name, info.file_size, archive)
    if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise DataError(
            f"{archive}: member {name!r} unpacks to {info.file_size} bytes from {info.compress_size}; refused"
        )


def _check_dictionary(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse an LZMA member whose header demands a dictionary of more than 128 MiB, up to 4 GB."""
    if info.compress_type != zipfile.ZIP_LZMA:
        return
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(LOCAL_HEADER_BYTES)[26:])
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        # Version (2 bytes), size of the properties (2), properties (1), dictionary size (4).
        (dictionary,) = struct.unpack("<I", file.read(9)[5:])
    if dictionary > XZ_MEMORY_BYTES:
        raise DataError(
            f"{path}: member {info.filename!r} needs {dictionary} bytes of memory to unpack; pack it with deflate"
        )


def _kind(info: zipfile.ZipInfo) -> Kind:
    mode = info.external_attr >> 16
    if info.is_dir():
        return "folder"
    if stat.S_ISLNK(mode):
        return "link"
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "special file"


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=8)
def _open_zip(path: str, size: int, modified_ns: int, process: int) -> zipfile.ZipFile:
    """Open a zip file once per process: reading the directory of a large one takes longer than reading a member.

    The process id is part of the key, because a file handle that a fork inherits shares its position.
    """
    try:
        archive = zipfile.ZipFile(path)
        if any(not info.flag_bits & UTF8_FLAG and not info.filename.isascii() for info in archive.infolist()):
            archive = _with_utf8_names(path) or archive
    except DAMAGE as error:
        raise DataError(f"{path}: not a complete zip file ({error}); download it again") from error
    return archive


def _with_utf8_names(path: str) -> zipfile.ZipFile | None:
    """Names without the flag of UTF-8 are in code page 437 by the standard, but many programs write UTF-8."""
    try:
        return zipfile.ZipFile(path, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return None


@lru_cache(maxsize=8)
def _checked_members(path: str, size: int, modified_ns: int) -> tuple[zipfile.ZipInfo, ...]:
    infos = _open_zip(path, size, modified_ns, os.getpid()).infolist()
    names: set[PurePosixPath] = set()
    total = 0
    for info in infos:
        check_member(info, path)
        name = PurePosixPath(info.filename)
        if name in names:
            raise DataError(f"{path}: two members are named {info.filename!r}; pack the archive again")
        names.add(name)
        total += info.file_size
    if total > MAX_TOTAL_BYTES or total > MAX_RATIO * max(size, RATIO_FREE_BYTES):
        raise DataError(f"{path}: {size} bytes unpack to {total} bytes; refused")
    return tuple(infos)
