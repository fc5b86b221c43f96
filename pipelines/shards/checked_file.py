"""Compares a file of a dataset with its entry in the manifest."""

from __future__ import annotations

from pathlib import Path

from metagmvae.pipelines.files import reading, sha256_once
from metagmvae.pipelines.records import DataError

SHARD_REMEDY = "`metagmvae verify` lists all damaged files; write the dataset again"


def check_file(path: Path, kind: str, digest: str | None, size: int | None = None) -> None:
    """Compare the size and the sha256 of a file with the manifest, where they are given.

    Raises:
        DataError: the file is missing, cannot be read, or differs.
    """
    with reading(path):
        if not path.exists():
            raise DataError(f"{path}: {kind} is missing; {SHARD_REMEDY}")
        actual = path.stat().st_size
    if size is not None and actual != size:
        raise DataError(f"{path}: {kind} has {actual} bytes instead of {size}; {SHARD_REMEDY}")
    if digest is not None and sha256_once(path) != digest:
        raise DataError(f"{path}: {kind} was altered after writing (sha256 differs); {SHARD_REMEDY}")
