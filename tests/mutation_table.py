"""Reads `mutations.toml`, the table of the mutations that `mutation.py` tries."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """One wrong change of one file."""

    what: str
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    file: str
    tests: tuple[str, ...]
    """Test files (below `tests/`), at least one of which must fail."""


def _read(path: Path) -> tuple[Mutation, ...]:
    groups = tomllib.loads(path.read_text(encoding="utf-8"))["group"]
    return tuple(
        Mutation(*entry, group["file"], tuple(group["tests"])) for group in groups for entry in group["mutations"]
    )


MUTATIONS = _read(Path(__file__).with_name("mutations.toml"))
