"""Source -> WebDataset tars of blocks of rows, a Parquet index per split, and `dataset.json`, written last.

The same source and settings give the same bytes, whatever the number of workers: rows stand in one global
seeded permutation, a shard is a pure function of its rows, and nothing of the clock or the machine goes
into it. M consecutive samples are therefore a random unlabelled set. Class labels stand in the index only.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from metagmvae.pipelines.files import atomic_file, read_json, sha256_file, sha256_json, write_json
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.index import write_index
from metagmvae.pipelines.shards.manifest import INDEX, MANIFEST, SCHEMA_VERSION

PLAN = ".writing.json"
"""What an unfinished folder is going to be; there while shards are written, gone when `dataset.json` stands."""


class RowSource(Protocol):
    """What the writer needs of a source of images or features; it travels to workers, so it must be picklable."""

    @property
    def name(self) -> str: ...

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one row: (C, H, W) or (F,)."""

    @property
    def dtype(self) -> str: ...

    @property
    def about(self) -> dict[str, Any]:
        """What else stands in the manifest: `kind` and `image_shape` at least."""

    @property
    def attachments(self) -> dict[str, Path]:
        """Files that go with the data set, by their name in it."""

    @property
    def permuted(self) -> bool:
        """Rows stand in a random order already, which is kept."""

    @property
    def splits(self) -> Mapping[str, Sequence[ImageRecord]]: ...

    @property
    def fingerprint(self) -> str: ...

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Rows of a split: (n, *row_shape)."""


def write_dataset(
    source: RowSource,
    out: str | Path,
    *,
    seed: int = 0,
    block: int = 512,
    shard_rows: int = 8192,
    map_tasks: MapTasks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a whole data set; return its manifest.

    A folder that holds the same data set already is left alone; one that was being written when the process
    was killed is finished, and ends up as if it had not been. Finished shards are not written again.

    Args:
        source: images or features by split.
        out: folder.
        seed: of the permutation.
        block: rows per `.npy` member.
        shard_rows: rows per tar.
        map_tasks: runs the shard tasks (Ray tasks, say); in this process when None.
        on_progress: told (shards done, shards in all).

    Raises:
        DataError: the source is empty, the folder holds something else, or cannot be written.
    """
    out = Path(out)
    settings = {"seed": seed, "block": block, "shard_rows": shard_rows}
    plan = {"source": source.fingerprint, "settings": settings, "schema_version": SCHEMA_VERSION}
    if not any(source.splits.values()):
        raise DataError(f"source {source.name!r} holds nothing: no file was written to {out}")
    finished = _claim(out, plan)
    if finished is not None:
        return finished
    tasks = [task for split in source.splits for task in _split_tasks(source, out, split, settings)]
    pending = [task for task in tasks if not Path(task[3]).exists()]
    done = len(tasks) - len(pending)
    run = map_tasks or _in_process
    try:
        for _ in run(write_shard, pending):
            done += 1
            if on_progress is not None:
                on_progress(done, len(tasks))
    except Exception:
        # Nothing runs any more. After an interrupt workers may: the plan stays.
        _remove_unfinished(out)
        if not any(out.glob("*/shard-*.tar")):
            _release(out)
        raise
    _remove_unfinished(out)
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


def _claim(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder ours; the manifest if it is finished already, None if there is work to do."""
    if (out / MANIFEST).exists():
        manifest = read_json(out / MANIFEST)
        same = {
            "source": manifest.get("source_fingerprint"),
            "settings": manifest.get("settings"),
            "schema_version": manifest.get("schema_version"),
        }
        if same != plan:
            raise DataError(f"{out}: holds another data set ({manifest.get('name')}); choose another --out")
        return manifest
    if (out / PLAN).exists():
        if read_json(out / PLAN) != plan:
            raise DataError(f"{out}: an unfinished data set of other settings is there; remove it first")
        _remove_unfinished(out)
        return None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty and not a data set; choose an empty or new folder for --out")
    write_json(out / PLAN, plan)
    return None


def _remove_unfinished(out: Path) -> None:
    """Files that a killed process, or a worker whose task another one did again, was writing."""
    for leftover in [*out.glob("*/.*.tmp"), *out.glob(".*.tmp")]:
        leftover.unlink()


def _release(out: Path) -> None:
    """Leave nothing where no shard was finished: there is nothing to go on with."""
    (out / PLAN).unlink(missing_ok=True)
    for folder in [*(path for path in out.glob("*") if path.is_dir()), out]:
        with suppress(OSError):  # it holds something, or others need it
            folder.rmdir()


def _in_process(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Any:
    return (function(*task) for task in tasks)


def stored_rows(source: RowSource, split: str, seed: int) -> np.ndarray:
    """The order in which a split is stored: a permutation of its source rows."""
    count = len(source.splits[split])
    return np.arange(count) if source.permuted else keyed_rng("shards", seed, split).permutation(count)


def _attach(source: RowSource, out: Path) -> dict[str, Any]:
    """Copy the files that go with a data set; return their part of the manifest."""
    part = {}
    for name, path in source.attachments.items():
        with atomic_file(out / name) as file, open(path, "rb") as content:
            shutil.copyfileobj(content, file)
        part[name] = {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
    return part


def _split_tasks(
    source: RowSource, out: Path, split: str, settings: dict[str, int]
) -> list[tuple[RowSource, str, np.ndarray, str, int]]:
    order = stored_rows(source, split, settings["seed"])
    size = settings["shard_rows"]
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    return [
        (source, split, rows, str(out / split / shard_name(number)), settings["block"])
        for number, rows in enumerate(chunks)
    ]


def shard_name(number: int) -> str:
    """File name of a shard within its split."""
    return f"shard-{number:06d}.tar"


def write_shard(source: RowSource, split: str, rows: np.ndarray, path: str, block: int) -> str:
    """One task: write the given source rows as blocks into one tar; return its path."""
    import webdataset as wds

    shard = Path(path).stem
    owner = {"mtime": 0, "user": "metagmvae", "group": "metagmvae", "mode": 0o644}
    # Closed after an error too: a tar's destructor would print that error once more.
    with atomic_file(path) as file, closing(wds.TarWriter(file, encoder=False, **owner)) as writer:
        for number, first in enumerate(range(0, len(rows), block)):
            values = source.load_block(split, rows[first : first + block].tolist())
            expected = (len(rows[first : first + block]), *source.row_shape)
            if values.dtype != np.dtype(source.dtype) or values.shape != expected:
                raise DataError(f"{path}: the source gave {values.dtype} {values.shape}, not {source.dtype} {expected}")
            header = f'{{"split": "{split}", "block": {number}, "rows": {len(values)}}}'
            writer.write({"__key__": f"{shard}-{number:06d}", "json": header.encode(), "x.npy": _npy_bytes(values)})
    return path


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def shard_blocks(path: str | Path) -> list[tuple[int, tuple[int, ...], str]]:
    """Where the arrays of a shard lie: (offset of the first value in the tar, shape, dtype) by block.

    Raises:
        DataError: the tar is truncated or holds something that is not an array of plain numbers.
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
                    raise DataError(f"{path}: {member.name} is not an array of ours")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if fortran or dtype.hasobject:
                    raise DataError(f"{path}: {member.name} is not a plain array")
                blocks.append((member.offset_data + file.tell(), shape, dtype.str))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable shard ({error}); write the data set again") from error
    return blocks


def _finish_split(source: RowSource, out: Path, split: str, settings: dict[str, int]) -> dict[str, Any]:
    """Write the index of a split from its finished shards; return its part of the manifest."""
    records = source.splits[split]
    order = stored_rows(source, split, settings["seed"])
    class_names = sorted({record.class_name for record in records})
    size = int(np.prod(source.row_shape)) * np.dtype(source.dtype).itemsize
    shards, places = [], []
    for path in sorted((out / split).glob("shard-*.tar")):
        blocks = shard_blocks(path)
        starts = [offset + size * np.arange(shape[0], dtype=np.int64) for offset, shape, _ in blocks]
        places.append((path.name, np.concatenate(starts)))
        rows = sum(shape[0] for _, shape, _ in blocks)
        shards.append({"name": path.name, "sha256": sha256_file(path), "rows": rows, "bytes": path.stat().st_size})
    write_index(
        out / split / INDEX,
        records,
        order=order,
        shards=places,
        sample_bytes=size,
        class_names=class_names,
        source_name=source.name,
    )
    index = out / split / INDEX
    return {
        "samples": len(records),
        "classes": len(class_names),
        "index_sha256": sha256_file(index),
        "shards": shards,
    }
