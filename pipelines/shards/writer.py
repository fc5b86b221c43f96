"""Writes a dataset: WebDataset tar files of blocks of rows, an index per split, and at the end `dataset.json`.

The same source and settings give the same bytes for any number of workers: a shard depends on its rows alone, not on
time or machine. The rows of a split are stored in a seeded random order, so M consecutive rows are a random unlabelled
set. Class labels are in the index only. `pipelines/README.md` describes the files.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metagmvae.pipelines.files import atomic_file, sha256_file, sha256_json, write_json
from metagmvae.pipelines.records import DataError, MapTasks, ProgressCallback, printable
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.blocks import block_positions, shard_blocks
from metagmvae.pipelines.shards.encoded import image_members
from metagmvae.pipelines.shards.image_codec import worth_encoding
from metagmvae.pipelines.shards.index import count_groups, write_index
from metagmvae.pipelines.shards.manifest import INDEX, LOSSLESS, MANIFEST, SCHEMA_VERSION, Quality
from metagmvae.pipelines.shards.row_source import RowSource
from metagmvae.pipelines.shards.shard_writer import write_shard
from metagmvae.pipelines.shards.unfinished import (
    LOCK,
    PLAN,
    check_folder,
    complete_manifest,
    finished_manifest,
    lock_folder,
    remove_empty_dataset,
    remove_temporary_files,
)

Store = Literal["decoded", "encoded"]
"""Whether the shards contain the pixels of images, or encoded images."""
MAX_SHARDS = 1_000_000
"""The names of the shards have six digits."""


def write_dataset(
    source: RowSource,
    out: str | Path,
    *,
    seed: int = 0,
    block: int = 512,
    shard_rows: int = 8192,
    store: Store = "decoded",
    quality: Quality = LOSSLESS,
    map_tasks: MapTasks | None = None,
    on_progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Write a dataset; return its manifest.

    Nothing is written if the folder already contains the same dataset. If an earlier process was killed while writing
    it, only the missing shards are written; the result is the same.

    Args:
        source: images or features by split.
        out: folder of the dataset.
        seed: seed of the permutation of the rows.
        block: rows per `.npy` member of decoded images and of features.
        shard_rows: rows per tar file.
        store: `encoded` stores each image as a JPEG or WebP file: as it was read where that gives exactly the prepared
            pixels, else encoded again.
        quality: of images that are encoded again: `lossless` (WebP), or 1 to 100 (JPEG).
        map_tasks: runs the shard tasks, for example as Ray tasks; None runs them in this process.
        on_progress: called with (finished shards, all shards).

    Raises:
        DataError: the source is empty, the folder contains something else, or it cannot be written.
    """
    out = Path(out)
    plan = check_dataset(source, out, seed=seed, block=block, shard_rows=shard_rows, store=store, quality=quality)
    manifest = finished_manifest(out, plan)
    if manifest is None or (out / PLAN).exists() or (out / LOCK).exists():
        with lock_folder(out, plan):
            # Another process may have finished the dataset before this one had the lock.
            manifest = finished_manifest(out, plan) or _write(source, out, plan, map_tasks, on_progress)
            remove_temporary_files(out)
            (out / PLAN).unlink(missing_ok=True)
    return complete_manifest(out, manifest, source.about)


def check_dataset(
    source: RowSource,
    out: Path,
    *,
    seed: int = 0,
    block: int = 512,
    shard_rows: int = 8192,
    store: Store = "decoded",
    quality: Quality = LOSSLESS,
) -> dict[str, Any]:
    """Check a source, and that the folder is free for it, as `write_dataset` does; return the plan of the dataset.

    Raises:
        DataError: the source is empty or cannot be stored so, or the folder contains something else.
    """
    settings: dict[str, Any] = {"seed": seed, "block": block, "shard_rows": shard_rows}
    if store == "encoded":
        _check_encodable(source)
        settings = {"seed": seed, "shard_rows": shard_rows, "store": store, "quality": quality}
    plan = {"source": source.fingerprint, "settings": settings, "schema_version": SCHEMA_VERSION}
    if not any(source.splits.values()):
        raise DataError(f"source {source.name!r} has no images, so nothing was written to {out}; check --source")
    _check_names(source)
    _check_shards(source, shard_rows)
    if finished_manifest(out, plan) is None:
        check_folder(out, plan)
    return plan


def _write(
    source: RowSource,
    out: Path,
    plan: dict[str, Any],
    map_tasks: MapTasks | None,
    on_progress: ProgressCallback | None,
) -> dict[str, Any]:
    """Write the shards that are missing, then the indices and the manifest, which is returned."""
    remove_temporary_files(out)
    if not (out / PLAN).exists():
        write_json(out / PLAN, plan)
    settings = plan["settings"]
    tasks = [task for split in source.splits for task in _split_tasks(source, out, split, settings)]
    pending = [task for task in tasks if not Path(task[3]).exists()]
    done = len(tasks) - len(pending)
    run = map_tasks or itertools.starmap
    try:
        for _ in run(write_shard, pending):
            done += 1
            if on_progress is not None:
                on_progress(done, len(tasks))
    except Exception:
        # No task is running now. After an interrupt (not an Exception) tasks may still be running: keep their files.
        remove_temporary_files(out)
        if not any(out.glob("*/shard-*.tar")):
            remove_empty_dataset(out)
        raise
    remove_temporary_files(out)
    manifest = {
        "name": source.name,
        "schema_version": SCHEMA_VERSION,
        **source.about,
        "dtype": source.dtype,
        **({"store": {"members": "encoded", "quality": settings["quality"]}} if "store" in settings else {}),
        "source_fingerprint": source.fingerprint,
        "settings": settings,
        "settings_fingerprint": sha256_json(settings),
        **({"attachments": _attach(source, out)} if source.attachments else {}),
        "splits": {split: _finish_split(source, out, split, settings) for split in source.splits},
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _check_shards(source: RowSource, shard_rows: int) -> None:
    largest = max(map(len, source.splits.values()))
    if largest > MAX_SHARDS * shard_rows:
        least = -(-largest // MAX_SHARDS)
        raise DataError(f"more than {MAX_SHARDS} shards of {shard_rows} rows; set --rows-per-shard to {least} or more")


def _check_encodable(source: RowSource) -> None:
    shape = " x ".join(map(str, source.row_shape))
    if source.about["kind"] != "images":
        raise DataError(f"source {source.name!r}: features are not stored encoded; use --store decoded")
    if not worth_encoding(source.row_shape):
        size = f"{math.prod(source.row_shape):,} bytes"
        raise DataError(
            f"source {source.name!r}: encoding saves nothing on images of {shape} ({size}); use --store decoded"
        )


def _check_names(source: RowSource) -> None:
    """Refuse keys and class names that are not UTF-8, which the index cannot hold, and groups of some samples only.

    Raises:
        DataError: naming the first one.
    """
    if source.permuted:  # the names of an existing dataset
        return
    grouped = None
    for record in itertools.chain.from_iterable(source.splits.values()):
        if grouped not in (None, bool(record.group)):
            raise DataError(f"source {source.name!r}: {printable(record.key)} has no group, or others have none")
        grouped = bool(record.group)
        for name in (record.key, record.class_name):
            if not name.isascii() and name != name.encode(errors="replace").decode():
                raise DataError(f"source {source.name!r}: the name {name!a} is not UTF-8; rename it")


def _storage_order(source: RowSource, split: str, seed: int) -> np.ndarray:
    """(n,): the source row that is stored in each row of a split."""
    count = len(source.splits[split])
    return np.arange(count) if source.permuted else keyed_rng("shards", seed, split).permutation(count)


def _attach(source: RowSource, out: Path) -> dict[str, Any]:
    """Copy the additional files of a dataset; return their part of the manifest."""
    entries = {}
    for name, path in source.attachments.items():
        with atomic_file(out / name) as file, open(path, "rb") as content:
            shutil.copyfileobj(content, file)
        entries[name] = {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
    return entries


def _split_tasks(
    source: RowSource, out: Path, split: str, settings: dict[str, Any]
) -> list[tuple[RowSource, str, np.ndarray, str, dict[str, Any]]]:
    order = _storage_order(source, split, settings["seed"])
    size = settings["shard_rows"]
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        (source, split, rows, str(out / split / f"shard-{number:06d}.tar"), settings)
        for number, rows in enumerate(chunks)
    ]


def _finish_split(source: RowSource, out: Path, split: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the index of a split from its finished shards; return its part of the manifest."""
    records = source.splits[split]
    order = _storage_order(source, split, settings["seed"])
    class_names = sorted({record.class_name for record in records})
    shards, positions, formats = [], [], Counter[str]()
    for path in sorted((out / split).glob("shard-*.tar")):
        with open(path, "rb") as file:
            if "store" in settings:
                offsets, sizes, used = image_members(file, path)
                formats += used
            else:
                offsets, sizes = block_positions(shard_blocks(file, path))
        positions.append((path.name, offsets, sizes))
        size = path.stat().st_size
        shards.append({"name": path.name, "sha256": sha256_file(path), "rows": len(offsets), "bytes": size})
    write_index(
        out / split / INDEX,
        records,
        order=order,
        shards=positions,
        class_names=class_names,
        source_name=source.name,
    )
    return {
        "samples": len(records),
        "classes": len(class_names),
        **({"groups": groups} if (groups := count_groups(records)) else {}),
        "index_sha256": sha256_file(out / split / INDEX),
        **({"formats": dict(sorted(formats.items()))} if "store" in settings else {}),
        "shards": shards,
    }
