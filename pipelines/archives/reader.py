"""Lists and reads the files of a folder, a zip file or a tar file, without unpacking archives to disk.

Archives are untrusted: members with names that point outside, links, and encrypted, duplicate or extremely compressed
members are refused before anything is read, and no member is unpacked beyond its stated size. The same files give the
same entries in a folder and in an archive. `pipelines.archives.tar` reads tar files.
"""

from __future__ import annotations

import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from metagmvae.pipelines.archives.entries import (
    MAX_RATIO,
    MAX_TOTAL_BYTES,
    RATIO_FREE_BYTES,
    Entry,
    check_name,
    check_size,
)
from metagmvae.pipelines.archives.tar import TAR_SUFFIXES, is_tar, read_member, tar_entries
from metagmvae.pipelines.records import DataError

ARCHIVES = (".zip", *TAR_SUFFIXES)
CHUNK_BYTES = 2**20
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
)
"""Exceptions of `zipfile` and its decompressors on damaged data or unknown compression methods."""


def list_entries(root: str | Path, suffixes: tuple[str, ...]) -> list[Entry]:
    """Files with one of the suffixes (in lower case) in a folder or an archive, sorted by name.

    Hidden files and `__MACOSX` are skipped. Symbolic links in folders are followed.

    Raises:
        DataError: `root` does not exist or cannot be read, or the archive is unsafe (see `check_member`).
    """
    root = Path(root)
    if root.is_dir():
        entries = list(_folder_entries(root, suffixes))
    elif root.is_file() and is_tar(root):
        entries = [entry for entry in tar_entries(root) if _is_included(entry.name, suffixes)]
    elif root.is_file():
        infos = [info for info in _checked_members(str(root), *_identity(root)) if not info.is_dir()]
        entries = [
            Entry(info.filename, info.CRC, info.file_size) for info in infos if _is_included(info.filename, suffixes)
        ]
    else:
        raise DataError(f"{root}: no such file or folder; check --source")
    for entry in entries:
        if not _is_text(entry.name):
            raise DataError(f"{root}: file name {entry.name!r} is not one line of UTF-8; rename the file")
    return sorted(entries)


def read_entry(root: str | Path, name: str) -> bytes:
    """Content of one file.

    Raises:
        DataError: the file is missing or damaged, or the archive is unsafe.
    """
    path = Path(root)
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        if is_tar(path):
            return read_member(path, name)
        archive = _open_zip(str(path), *_identity(path), os.getpid())
        info = archive.getinfo(name)
        check_member(info, str(path))
        # Limits the unpacked size of a member whose stated size is wrong; one byte more than stated detects it.
        with archive.open(info) as member:
            data = member.read(info.file_size + 1)
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{root}: no member {name}") from error
    except DAMAGE as error:
        raise DataError(f"{root}: {name} cannot be read ({error}); download the file again") from error
    if len(data) != info.file_size:
        raise DataError(f"{root}: {name} has {len(data)} of {info.file_size} bytes; download the file again")
    return data


def _is_text(name: str) -> bool:
    """Whether a name is valid UTF-8 and one line; file systems also allow other names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return len(name.splitlines()) == 1 and "\0" not in name


def check_member(info: zipfile.ZipInfo, archive: str) -> None:
    """Refuse a member of a zip file that points outside the archive, is a link, is encrypted, or is too large.

    Raises:
        DataError: with the names of the archive and the member.
    """
    name = info.filename
    check_name(name, archive)
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(f"{archive}: member {name!r} is a link; refused")
    if info.flag_bits & 1:
        raise DataError(f"{archive}: member {name!r} is encrypted; pack the archive without a password")
    check_size(name, info.file_size, archive)
    if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise DataError(
            f"{archive}: member {name!r} unpacks to {info.file_size} bytes from {info.compress_size}; refused"
        )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=8)
def _open_zip(path: str, size: int, modified_ns: int, process: int) -> zipfile.ZipFile:
    """Open a zip file once per process: reading the directory of a large one takes longer than reading a member.

    The process id is part of the key, because a file handle that a fork inherits shares its position.
    """
    try:
        return zipfile.ZipFile(path)
    except DAMAGE as error:
        raise DataError(f"{path}: not a complete zip file ({error}); download it again") from error


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


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is hidden or made by macOS."""
    return name.startswith(".") or name == "__MACOSX"


def _is_included(name: str, suffixes: tuple[str, ...]) -> bool:
    return not any(map(is_hidden, PurePosixPath(name).parts)) and name.lower().endswith(suffixes)


def _folder_entries(root: Path, suffixes: tuple[str, ...]) -> Iterator[Entry]:
    visited: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            raise DataError(f"{folder}: links to a folder that has been read already; remove the link")
        visited.add((status.st_dev, status.st_ino))
        for file in files:
            path = Path(folder) / file
            name = path.relative_to(root).as_posix()
            if not _is_included(name, suffixes):
                continue
            # Reading a pipe would block forever.
            if not path.is_file():
                raise DataError(f"{path}: not a regular file; remove it")
            yield Entry(name, *_checksum(path))


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: folder cannot be read ({error.strerror})") from error


def _checksum(path: Path) -> tuple[int, int]:
    crc, size = 0, 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return crc, size
