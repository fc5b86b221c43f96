"""What a member of any archive may be called, and how large it may be."""

from __future__ import annotations

from dataclasses import dataclass

from metagmvae.pipelines.records import DataError

MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 256 * 2**30
MAX_RATIO = 200
"""Unpacked over packed bytes, of a member or of the whole: images do not compress like this."""
RATIO_FREE_BYTES = 2**20
"""Smaller members may: a blank picture does."""


@dataclass(frozen=True, order=True)
class Entry:
    """One file: its name with `/`, relative to the root, and its content's CRC-32 and size in bytes."""

    name: str
    crc: int
    size: int


def check_name(name: str, archive: str) -> None:
    """Refuse the name of a member that could leave the archive.

    Raises:
        DataError: naming the archive and the member.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ":" in parts[0] or ".." in parts:
        raise DataError(f"{archive}: member {name!r} leads out of the archive; refused")
    if "\\" in name:
        raise DataError(f"{archive}: member {name!r} has no folders, but backslashes; pack it again with /")


def check_size(name: str, size: int, archive: str) -> None:
    """Refuse a member that is larger than any picture.

    Raises:
        DataError: naming the archive and the member.
    """
    if size > MAX_MEMBER_BYTES:
        raise DataError(f"{archive}: member {name!r} unpacks to {size} bytes; refused")
