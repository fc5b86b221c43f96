"""Files by name from a folder, zip or tar that is never unpacked, behind the same two functions.

Archives come from elsewhere: names that leave them, links, encrypted, doubled or absurdly compressed members are
refused before anything is read, and no member is unpacked beyond the size it states. The same files give the
same entries, archived or not. Tars are read by `pipelines.archives.tar`.
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
"""What `zipfile` and its decompressors raise on damaged bytes, or on methods that they do not know."""


def list_entries(root: str | Path, suffixes: tuple[str, ...]) -> list[Entry]:
    """Files with one of the suffixes (lower case) under a folder or in an archive, sorted by name.

    Hidden files and `__MACOSX` are left out. Links are followed.

    Raises:
        DataError: root is neither, cannot be read, or the zip is unsafe (see `check_member`).
    """
    root = Path(root)
    if root.is_dir():
        entries = list(_folder_entries(root, suffixes))
    elif root.is_file() and is_tar(root):
        entries = [entry for entry in tar_entries(root) if _wanted(entry.name, suffixes)]
    elif root.is_file():
        infos = [info for info in _checked_members(str(root), *_identity(root)) if not info.is_dir()]
        entries = [Entry(info.filename, info.CRC, info.file_size) for info in infos if _wanted(info.filename, suffixes)]
    else:
        raise DataError(f"{root}: no such file or folder; name one that exists with --source")
    for entry in entries:
        if not is_text(entry.name):
            raise DataError(f"{root}: file name {entry.name!r} is not text in UTF-8 on one line; rename it")
    return sorted(entries)


def read_entry(root: str | Path, name: str) -> bytes:
    """The bytes of one file.

    Raises:
        DataError: it is missing, damaged, or the zip is unsafe.
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
        # Asking for one byte more than stated bounds what a member that lies about its size can unpack to.
        with archive.open(info) as member:
            data = member.read(info.file_size + 1)
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{root}: no member {name}") from error
    except DAMAGE as error:
        raise DataError(f"{root}: {name} cannot be read ({error}); fetch the file again") from error
    if len(data) != info.file_size:
        raise DataError(f"{root}: {name} holds {len(data)} of {info.file_size} bytes; fetch the file again")
    return data


def is_text(name: str) -> bool:
    """Whether a name can be written in UTF-8 and on one line: file systems keep names that cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return len(name.splitlines()) == 1 and "\0" not in name


def check_member(info: zipfile.ZipInfo, archive: str) -> None:
    """Refuse a member that could leave the archive, is a link, is encrypted, or unpacks to absurd size.

    Raises:
        DataError: naming the archive and the member.
    """
    name = info.filename
    check_name(name, archive)
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(f"{archive}: member {name!r} is a link; refused")
    if info.flag_bits & 1:
        raise DataError(f"{archive}: member {name!r} is encrypted; pack it without a password")
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
    """Opened once per process: the directory of a large zip takes longer to read than a member.

    Keyed by the process as well, since a file handle inherited by a fork shares its position.
    """
    try:
        return zipfile.ZipFile(path)
    except DAMAGE as error:
        raise DataError(f"{path}: not a whole zip file ({error}); fetch it again") from error


@lru_cache(maxsize=8)
def _checked_members(path: str, size: int, modified_ns: int) -> tuple[zipfile.ZipInfo, ...]:
    infos = _open_zip(path, size, modified_ns, os.getpid()).infolist()
    seen: set[PurePosixPath] = set()
    total = 0
    for info in infos:
        check_member(info, path)
        name = PurePosixPath(info.filename)
        if name in seen:
            raise DataError(f"{path}: two members are named {info.filename!r}; pack it again")
        seen.add(name)
        total += info.file_size
    if total > MAX_TOTAL_BYTES or total > MAX_RATIO * max(size, RATIO_FREE_BYTES):
        raise DataError(f"{path}: {size} bytes that unpack to {total} in all; refused")
    return tuple(infos)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is one that other programs leave beside the pictures."""
    return name.startswith(".") or name == "__MACOSX"


def _wanted(name: str, suffixes: tuple[str, ...]) -> bool:
    return not any(map(is_hidden, PurePosixPath(name).parts)) and name.lower().endswith(suffixes)


def _folder_entries(root: Path, suffixes: tuple[str, ...]) -> Iterator[Entry]:
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if _wanted(name, ("",))]
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"{folder}: a link to a folder that is read already; remove it")
        seen.add((status.st_dev, status.st_ino))
        for file in files:
            path = Path(folder) / file
            name = path.relative_to(root).as_posix()
            if not _wanted(name, suffixes):
                continue
            # A pipe would block for ever.
            if not path.is_file():
                raise DataError(f"{path}: no plain file, or a link to none; remove it")
            yield Entry(name, *_checksum(path))


def _refuse(error: OSError) -> None:
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
