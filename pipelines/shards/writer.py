"""Writes a dataset: WebDataset tar files of blocks of rows, an index per split, and at the end `dataset.json`.

The same source and settings give the same bytes for any number of workers: a shard depends on its rows alone, not on
time or machine. The rows of a split are stored in a seeded random order, so M consecutive rows are a random unlabelled
set. Class labels are in the index only. `pipelines/README.md` describes the files.
"""

from __future__ import annotations

import io
import itertools
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from metagmvae.pipelines.files import atomic_file, read_json, sha256_file, sha256_json, write_json
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks, ProgressCallback
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.index import write_index
from metagmvae.pipelines.shards.manifest import INDEX, MANIFEST, SCHEMA_VERSION

PLAN = ".writing.json"
"""Source and settings of an unfinished dataset; deleted when `dataset.json` has been written."""


class RowSource(Protocol):
    """Source of images or features for the writer. It is sent to workers, so it must be picklable."""

    @property
    def name(self) -> str:
        """Name of the dataset."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row: (C, H, W) or (F,)."""

    @property
    def dtype(self) -> str:
        """NumPy type of the rows."""

    @property
    def about(self) -> dict[str, Any]:
        """Further keys of the manifest, at least `kind` and `image_shape`."""

    @property
    def attachments(self) -> dict[str, Path]:
        """Additional files, by their name in the dataset."""

    @property
    def permuted(self) -> bool:
        """Whether the rows are already in random order, which is then kept."""

    @property
    def splits(self) -> Mapping[str, Sequence[ImageRecord]]:
        """Samples by split."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the rows."""

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Rows of a split, (n, *row_shape)."""


def write_dataset(
    source: RowSource,
    out: str | Path,
    *,
    seed: int = 0,
    block: int = 512,
    shard_rows: int = 8192,
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
        block: rows per `.npy` member.
        shard_rows: rows per tar file.
        map_tasks: runs the shard tasks, for example as Ray tasks; None runs them in this process.
        on_progress: called with (finished shards, all shards).

    Raises:
        DataError: the source is empty, the folder contains something else, or it cannot be written.
    """
    out = Path(out)
    settings = {"seed": seed, "block": block, "shard_rows": shard_rows}
    plan = {"source": source.fingerprint, "settings": settings, "schema_version": SCHEMA_VERSION}
    if not any(source.splits.values()):
        raise DataError(f"source {source.name!r} has no images, so nothing was written to {out}; check --source")
    manifest = _prepare_folder(out, plan)
    if manifest is not None:
        return _add_preprocessing(out, manifest, source.about)
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
        _remove_temporary_files(out)
        if not any(out.glob("*/shard-*.tar")):
            _remove_empty_dataset(out)
        raise
    _remove_temporary_files(out)
    manifest = {
        "name": source.name,
        "schema_version": SCHEMA_VERSION,
        **source.about,
        "dtype": source.dtype,
        "source_fingerprint": source.fingerprint,
        "settings": settings,
        "settings_fingerprint": sha256_json(settings),
        **({"attachments": _attach(source, out)} if source.attachments else {}),
        "splits": {split: _finish_split(source, out, split, settings) for split in source.splits},
    }
    write_json(out / MANIFEST, manifest)
    (out / PLAN).unlink(missing_ok=True)
    return manifest


def _prepare_folder(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Create the folder with the plan, or check an existing one; return the manifest if the dataset is finished."""
    if (out / MANIFEST).exists():
        manifest = read_json(out / MANIFEST)
        existing = {
            "source": manifest.get("source_fingerprint"),
            "settings": manifest.get("settings"),
            "schema_version": manifest.get("schema_version"),
        }
        if existing != plan:
            raise DataError(f"{out}: contains another dataset ({manifest.get('name')}); choose another --out")
        return manifest
    if (out / PLAN).exists():
        if read_json(out / PLAN) != plan:
            raise DataError(f"{out}: contains an unfinished dataset with other settings; remove it first")
        _remove_temporary_files(out)
        return None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty and not a dataset; choose a new or empty folder for --out")
    write_json(out / PLAN, plan)
    return None


def _add_preprocessing(out: Path, manifest: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Record the preprocessing in a manifest that an older version wrote; its fingerprint stays the same."""
    if "preprocessing" in manifest or "preprocessing" not in about:
        return manifest
    position = list(manifest).index("image_shape") + 1  # where new manifests have it
    items = list(manifest.items())
    manifest = dict([*items[:position], ("preprocessing", about["preprocessing"]), *items[position:]])
    write_json(out / MANIFEST, manifest)
    return manifest


def _remove_temporary_files(out: Path) -> None:
    """Remove the temporary files of a killed process, and of a worker whose task was repeated by another worker."""
    for path in [*out.glob("*/.*.tmp"), *out.glob(".*.tmp")]:
        path.unlink()


def _remove_empty_dataset(out: Path) -> None:
    """Remove the plan and the empty folders of a dataset without a finished shard."""
    (out / PLAN).unlink(missing_ok=True)
    for folder in [*(path for path in out.glob("*") if path.is_dir()), out]:
        with suppress(OSError):  # not empty, or in use
            folder.rmdir()


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
    source: RowSource, out: Path, split: str, settings: dict[str, int]
) -> list[tuple[RowSource, str, np.ndarray, str, int]]:
    order = _storage_order(source, split, settings["seed"])
    size = settings["shard_rows"]
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        (source, split, rows, str(out / split / f"shard-{number:06d}.tar"), settings["block"])
        for number, rows in enumerate(chunks)
    ]


def write_shard(source: RowSource, split: str, rows: np.ndarray, path: str, block: int) -> str:
    """Write source rows as blocks into one tar file; return its path. This is one task for a worker."""
    import webdataset as wds

    shard = Path(path).stem
    owner = {"mtime": 0, "user": "metagmvae", "group": "metagmvae", "mode": 0o644}
    # Closing it also after an error keeps the destructor of the tar file from printing the error again.
    with atomic_file(path) as file, closing(wds.TarWriter(file, encoder=False, **owner)) as writer:
        for number, first in enumerate(range(0, len(rows), block)):
            values = source.load_block(split, rows[first : first + block].tolist())
            expected = (len(rows[first : first + block]), *source.row_shape)
            if values.dtype != np.dtype(source.dtype) or values.shape != expected:
                raise DataError(f"{path}: rows are {values.dtype} {values.shape}, not {source.dtype} {expected}")
            header = f'{{"split": "{split}", "block": {number}, "rows": {len(values)}}}'
            writer.write({"__key__": f"{shard}-{number:06d}", "json": header.encode(), "x.npy": _npy_bytes(values)})
    return path


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def shard_blocks(path: str | Path) -> list[tuple[int, tuple[int, ...], str]]:
    """Blocks of a shard: (offset of the first value in the tar file in bytes, shape, dtype) each.

    Raises:
        DataError: the tar file is truncated, or a block is not an array of plain numbers.
    """
    blocks = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.name.endswith(".x.npy"):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                if np.lib.format.read_magic(file) != (1, 0):
                    raise DataError(f"{path}: {member.name} is not a NumPy array of format 1.0")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if fortran or dtype.hasobject:
                    raise DataError(f"{path}: {member.name} is not a C-ordered array of numbers")
                blocks.append((member.offset_data + file.tell(), shape, dtype.str))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable shard ({error}); write the dataset again") from error
    return blocks


def _finish_split(source: RowSource, out: Path, split: str, settings: dict[str, int]) -> dict[str, Any]:
    """Write the index of a split from its finished shards; return its part of the manifest."""
    records = source.splits[split]
    order = _storage_order(source, split, settings["seed"])
    class_names = sorted({record.class_name for record in records})
    size = int(np.prod(source.row_shape)) * np.dtype(source.dtype).itemsize
    shards, offsets = [], []
    for path in sorted((out / split).glob("shard-*.tar")):
        blocks = shard_blocks(path)
        rows_of_blocks = [offset + size * np.arange(shape[0], dtype=np.int64) for offset, shape, _ in blocks]
        offsets.append((path.name, np.concatenate(rows_of_blocks)))
        rows = sum(shape[0] for _, shape, _ in blocks)
        shards.append({"name": path.name, "sha256": sha256_file(path), "rows": rows, "bytes": path.stat().st_size})
    write_index(
        out / split / INDEX,
        records,
        order=order,
        shards=offsets,
        sample_bytes=size,
        class_names=class_names,
        source_name=source.name,
    )
    return {
        "samples": len(records),
        "classes": len(class_names),
        "index_sha256": sha256_file(out / split / INDEX),
        "shards": shards,
    }
