"""Files of a folder or an archive, and the names and sizes that are allowed for members of an archive."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Literal, Protocol

from metagmvae.pipelines.records import DataError

MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 256 * 2**30
MAX_RATIO = 200
"""Limit of the ratio of unpacked to packed bytes, for a member and for the whole archive. Images never exceed it."""
RATIO_FREE_BYTES = 2**20
"""Members up to this size are exempt, because a blank image compresses better."""
DRIVE = re.compile(r"[A-Za-z]:")

Kind = Literal["file", "folder", "link", "special file"]


@dataclass(frozen=True, order=True)
class Entry:
    """One file: its name relative to the root, with `/`, the CRC-32 of its content, and its size in bytes."""

    name: str
    crc: int
    size: int


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All files of a folder or an archive."""

    entries: list[Entry] = field(default_factory=list)
    """Files to read, sorted by name."""
    left_out: list[LeftOut] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Folders that are not hidden; in an archive only those that have a member of their own."""


class FileTree(Protocol):
    """The files of a folder, a zip file or a tar file."""

    def names(self) -> Iterator[tuple[str, Kind]]:
        """Names relative to the root, and kinds, in any order."""

    def entry(self, name: str) -> Entry:
        """Entry of a file."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. KeyError: no such file."""

    def read(self, name: str) -> bytes:
        """Content of a file. KeyError: no such file."""


def check_name(name: str, archive: str) -> None:
    """Refuse a member name that points outside the archive.

    Raises:
        DataError: with the names of the archive and the member.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or DRIVE.fullmatch(parts[0]) or ".." in parts:
        raise DataError(f"{archive}: member {name!r} points outside the archive; pack it again with relative names")
    if "\\" in name:
        raise DataError(f"{archive}: member {name!r} separates folders by backslashes; pack the archive again with /")


def check_size(name: str, size: int, archive: str) -> None:
    """Refuse a member that is larger than any image, or has a negative size.

    Raises:
        DataError: with the names of the archive and the member.
    """
    if size < 0:
        raise DataError(f"{archive}: member {name!r} has size {size}; not a complete archive, download it again")
    if size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{archive}: member {name!r} unpacks to {size} bytes, more than {MAX_MEMBER_BYTES}; pack the archive "
            "again without it"
        )
