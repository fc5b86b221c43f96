"""Reads members of a tar file by name, without unpacking it to files.

A tar file has no directory: it is read once, and the offsets of its members are kept. A compressed one allows no random
access, so its uncompressed content is copied once per process to an unnamed temporary file.
"""

from __future__ import annotations

import io
import lzma
import os
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple, Self

from metagmvae.pipelines.archives.entries import (
    MAX_RATIO,
    MAX_TOTAL_BYTES,
    RATIO_FREE_BYTES,
    Entry,
    Kind,
    check_name,
    check_size,
)
from metagmvae.pipelines.archives.formats import CHUNK_BYTES, Format, archive_format, decompressed
from metagmvae.pipelines.records import DataError

MAX_HEADER_BYTES = 2**20
"""Limit of the content of a header member (long names, pax keywords)."""
HEADER_TYPES = b"xgXLK"
"""Types of header members: keywords for one or all members, in pax and Solaris form, long names, long link names."""
LONG_NUMBER = re.compile(rb"\d{200}")
END_BYTES = 2 * tarfile.BLOCKSIZE
"""A tar file ends with at least two blocks of zeros."""
DAMAGE = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RecursionError,
    IndexError,
    OverflowError,
)
NOT_COMPLETE = "not a complete tar file"


class Member(NamedTuple):
    """One file, and its offset in the uncompressed tar file in bytes."""

    entry: Entry
    offset: int


class TarFiles:
    """The files of a tar file. A hard link is the file that it links to."""

    def __init__(self, file: IO[bytes], members: dict[str, Member], others: dict[str, Kind]) -> None:
        self.file = file
        """The tar file, or the temporary file with its content."""
        self.members = members
        self.others = others
        """Kind of each member that is not a file."""

    def __del__(self) -> None:
        self.file.close()

    def names(self) -> Iterator[tuple[str, Kind]]:
        """See `FileTree`."""
        yield from ((name, "file") for name in self.members)
        yield from self.others.items()

    def entry(self, name: str) -> Entry:
        """See `FileTree`."""
        return self.members[name].entry

    def read(self, name: str) -> bytes:
        """See `FileTree`."""
        member = self.members[name]
        return os.pread(self.file.fileno(), member.entry.size, member.offset)

    def open(self, name: str) -> IO[bytes]:
        """See `FileTree`."""
        return io.BytesIO(self.read(name))


def open_tar(path: Path) -> TarFiles:
    """Open a tar file, once per process; a fork must not use the file handle that it inherits.

    Raises:
        DataError: the tar file is damaged or unsafe.
    """
    status = path.stat()
    return _open_once(str(path), status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=4)
def _open_once(path: str, size: int, modified_ns: int, process: int) -> TarFiles:
    file = None
    try:
        file = _content(path, size, archive_format(Path(path)))
        return TarFiles(file, *_members(path, file))
    except DAMAGE as error:
        if file is not None:
            file.close()
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {NOT_COMPLETE} ({error}); download it again") from error


def _content(path: str, size: int, archive: Format) -> IO[bytes]:
    """The tar file itself, or its uncompressed content in an unnamed temporary file."""
    if archive == "tar":
        return open(path, "rb")
    remaining = min(MAX_TOTAL_BYTES, MAX_RATIO * max(size, RATIO_FREE_BYTES))
    spool = tempfile.TemporaryFile()  # noqa: SIM115, used until the process ends
    try:
        for chunk in decompressed(path, archive):
            remaining -= len(chunk)
            if remaining < 0:
                raise DataError(f"{path}: {size} bytes unpack to more than {MAX_RATIO} times their size; refused")
            _spool(spool, chunk, path)
    except BaseException:
        with suppress(OSError):  # closing tries to write the buffer again
            spool.close()
        raise
    return spool


def _spool(spool: IO[bytes], chunk: bytes, path: str) -> None:
    try:
        spool.write(chunk)
        spool.flush()
    except OSError as error:
        # The disk is full, the tar file is not damaged.
        raise DataError(
            f"{path}: cannot be unpacked to {tempfile.gettempdir()} ({error.strerror}); free some space, or set TMPDIR"
        ) from error


class _CheckedHeader(tarfile.TarInfo):
    """A header whose size is checked before `tarfile` reads or skips that many bytes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if not 0 <= info.size <= (MAX_HEADER_BYTES if info.type in HEADER_TYPES else MAX_TOTAL_BYTES):
            raise ValueError(f"member {info.name!r} has size {info.size}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"member {info.name!r} is sparse; pack the archive again without --sparse")
        return info

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        """Refuse long runs of digits, over which a regular expression of `tarfile` takes quadratic time."""
        assert archive.fileobj is not None
        position = archive.fileobj.tell()
        if LONG_NUMBER.search(archive.fileobj.read(self.size)):
            raise ValueError(f"header {self.name!r} is not a list of keywords")
        archive.fileobj.seek(position)
        return super()._proc_pax(archive)  # type: ignore[misc]


def _members(path: str, file: IO[bytes]) -> tuple[dict[str, Member], dict[str, Kind]]:
    """Files of a tar file, and kinds of its other members."""
    members: dict[str, Member] = {}
    others: dict[str, Kind] = {}
    links: dict[str, str] = {}
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_CheckedHeader) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # `tarfile` keeps all headers, about 1 KB each
            name = _plain_name(info.name)
            if info.size < 0 or info.offset_data + (info.size if info.isreg() else 0) > size:
                raise ValueError(f"member {name!r} has size {info.size}, beyond the end of the file")
            if info.isdir():
                others.setdefault(name, "folder")
                continue
            check_name(name, path)
            if name in members or name in links or name in others:
                raise DataError(f"{path}: two members are named {name!r}; pack the archive again")
            if info.issparse():
                raise DataError(f"{path}: member {name!r} is sparse; pack the archive again without --sparse")
            if info.isreg():
                members[name] = _read_member(path, file, name, info)
            elif info.islnk():
                links[name] = _plain_name(info.linkname)
            else:
                others[name] = "link" if info.issym() else "special file"
        _check_end(file, tar.offset, size)
    for name, target in links.items():
        linked = members.get(target)
        if linked is None:
            raise DataError(
                f"{path}: member {name!r} is a hard link to {target!r}, which is not in the archive; pack it again "
                "with that file, or with `tar --hard-dereference`"
            )
        members[name] = Member(Entry(name, linked.entry.crc, linked.entry.size), linked.offset)
    return members, others


def _plain_name(name: str) -> str:
    """Without `./` in front, doubled slashes and a slash at the end; `..` and a slash in front are kept."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if name.startswith("/") else "") + posixpath.join("", *parts)


def _read_member(path: str, file: IO[bytes], name: str, info: tarfile.TarInfo) -> Member:
    check_size(name, info.size, path)
    crc = zlib.crc32(os.pread(file.fileno(), info.size, info.offset_data))
    return Member(Entry(name, crc, info.size), info.offset_data)


def _check_end(file: IO[bytes], offset: int, size: int) -> None:
    """Refuse a file that does not end with the end mark: `tarfile` takes a damaged header for the end, too."""
    file.seek(offset)
    if size - offset < END_BYTES or size % tarfile.BLOCKSIZE:
        raise ValueError(f"it ends after {size} bytes without an end mark")
    while chunk := file.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise ValueError(f"a damaged header, or another archive behind the end mark, after {offset} bytes")
