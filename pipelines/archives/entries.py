"""Names and sizes that are allowed for the members of an archive."""

from __future__ import annotations

from dataclasses import dataclass

from metagmvae.pipelines.records import DataError

MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 256 * 2**30
MAX_RATIO = 200
"""Limit of the ratio of unpacked to packed bytes, for a member and for the whole archive. Images never exceed it."""
RATIO_FREE_BYTES = 2**20
"""Members up to this size are exempt, because a blank image compresses better."""


@dataclass(frozen=True, order=True)
class Entry:
    """One file: its name relative to the root, with `/`, the CRC-32 of its content, and its size in bytes."""

    name: str
    crc: int
    size: int


def check_name(name: str, archive: str) -> None:
    """Refuse a member name that points outside the archive.

    Raises:
        DataError: with the names of the archive and the member.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ":" in parts[0] or ".." in parts:
        raise DataError(f"{archive}: member {name!r} points outside the archive; refused")
    if "\\" in name:
        raise DataError(f"{archive}: member {name!r} separates folders by backslashes; pack the archive again with /")


def check_size(name: str, size: int, archive: str) -> None:
    """Refuse a member that is larger than any image.

    Raises:
        DataError: with the names of the archive and the member.
    """
    if size > MAX_MEMBER_BYTES:
        raise DataError(f"{archive}: member {name!r} unpacks to {size} bytes; refused")
