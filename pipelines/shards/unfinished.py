"""The folder of a dataset that is being written: its plan, its lock, and what a killed process left in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metagmvae.pipelines.files import exclusive_lock, read_json, write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.manifest import LATER_KEYS, MANIFEST, read_manifest

PLAN = ".writing.json"
"""Source and settings of an unfinished dataset; deleted when `dataset.json` has been written."""
LOCK = ".writing.lock"
"""Locked by the process that writes the dataset; deleted when it ends."""


def finished_manifest(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the folder; None if there is no finished dataset.

    Raises:
        DataError: the folder contains another dataset.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = read_json(out / MANIFEST)
    if not isinstance(manifest, dict):
        raise DataError(f"{out / MANIFEST}: not a manifest; choose another --out")
    existing = {
        "source": manifest.get("source_fingerprint"),
        "settings": manifest.get("settings"),
        "schema_version": manifest.get("schema_version"),
    }
    if existing != plan:
        raise DataError(f"{out}: contains another dataset ({manifest.get('name')}); choose another --out")
    return read_manifest(out / MANIFEST)


@contextmanager
def lock_folder(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Create the folder, check that nothing else is in it, and lock it against other writers.

    Raises:
        DataError: the folder contains something else, or another process writes to it.
    """
    if not (out / LOCK).exists():  # nothing is created in a folder of something else
        check_folder(out, plan)
    busy = f"{out}: another process writes this dataset; wait for it, or choose another --out"
    try:
        with exclusive_lock(out / LOCK, busy):
            check_folder(out, plan)
            yield
    finally:
        with suppress(OSError):  # not empty
            out.rmdir()


def check_folder(out: Path, plan: dict[str, Any]) -> None:
    """Check that the folder is new or empty, or holds this dataset, finished or not.

    Raises:
        DataError: it contains something else.
    """
    if (out / PLAN).exists():
        if read_json(out / PLAN) != plan:
            raise DataError(f"{out}: contains an unfinished dataset with other settings; remove it first")
    elif out.exists() and not (out / MANIFEST).exists():
        names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
        # A process that was killed leaves its lock file and perhaps a temporary file of its plan.
        if any(name != LOCK and not name.startswith(f".{PLAN}.") for name in names):
            raise DataError(f"{out}: not empty and not a dataset; choose a new or empty folder for --out")


def complete_manifest(out: Path, manifest: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that an older version did not write to a manifest; its fingerprint stays the same."""
    missing = [key for key in LATER_KEYS if key in about and key not in manifest]
    if not missing:
        return manifest
    order = dict.fromkeys(["name", "schema_version", *about, *manifest])  # of new manifests
    manifest = {key: manifest.get(key, about.get(key)) for key in order if key in manifest or key in missing}
    write_json(out / MANIFEST, manifest)
    return manifest


def remove_temporary_files(out: Path) -> None:
    """Remove the temporary files of a killed process, and of a worker whose task was repeated by another worker."""
    for path in [*out.glob("*/.*.tmp"), *out.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def remove_empty_dataset(out: Path) -> None:
    """Remove the plan and the empty folders of a dataset without a finished shard."""
    (out / PLAN).unlink(missing_ok=True)
    for folder in [path for path in out.glob("*") if path.is_dir()]:
        with suppress(OSError):  # not empty, or in use
            folder.rmdir()
