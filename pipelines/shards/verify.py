"""Compares the files of a dataset with its manifest (`metagmvae verify`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.records import DataError, ProgressCallback
from metagmvae.pipelines.shards.index import read_index
from metagmvae.pipelines.shards.manifest import INDEX, MANIFEST, REMEDY, dataset_files, read_manifest, split_files
from metagmvae.pipelines.shards.writer import PLAN, shard_blocks

ProblemKind = Literal["missing", "truncated", "altered", "foreign", "unfinished", "inconsistent"]


@dataclass(frozen=True)
class Problem:
    """One problem of a dataset."""

    kind: ProblemKind
    path: str
    """Path relative to the folder of the dataset."""
    detail: str


def verify_dataset(root: str | Path, on_progress: ProgressCallback | None = None) -> list[Problem]:
    """Compare every file of a dataset with its manifest; an intact dataset has no problems.

    Kinds of problems: `missing`: a file of the manifest does not exist. `truncated`: its size differs. `altered`: its
    sha256 differs. `foreign`: a file is not in the manifest. `unfinished`: the writer was stopped. `inconsistent`:
    manifest, index and shards contradict each other although every file has the right sha256.

    Args:
        root: folder of the dataset.
        on_progress: called with (files compared, all files).

    Raises:
        DataError: there is no dataset, or its manifest is damaged.
    """
    root = Path(root)
    if not (root / MANIFEST).is_file():
        if (root / PLAN).exists():
            detail = "the writer was stopped; run the same `metagmvae prepare` again to finish it"
            return [Problem("unfinished", MANIFEST, detail)]
        raise DataError(f"{root}: no {MANIFEST} there; give the folder of a dataset")
    manifest = read_manifest(root / MANIFEST)
    total = sum(1 for _ in dataset_files(manifest))
    problems, done = list(_foreign(root, manifest)), 0
    for name, file in manifest.get("attachments", {}).items():
        problems += _compare(root / name, name, file["bytes"], file["sha256"])
        done += 1
    for split, part in manifest["splits"].items():
        intact = True
        for name, size, digest in split_files(split, part):
            new = _compare(root / name, name, size, digest)
            problems += new
            intact = intact and not new
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        if intact:
            problems += _inconsistent(root, split, part)
    return problems


def _compare(path: Path, name: str, size: int | None, digest: str) -> list[Problem]:
    if not path.is_file():
        return [Problem("missing", name, REMEDY)]
    actual = path.stat().st_size
    if size is not None and actual != size:
        return [Problem("truncated", name, f"{actual} bytes instead of {size}; {REMEDY}")]
    if sha256_file(path) != digest:
        return [Problem("altered", name, f"its sha256 differs from the manifest; {REMEDY}")]
    return []


def _foreign(root: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    files = [name for name, _, _ in dataset_files(manifest)]
    known = {MANIFEST, *manifest["splits"], *files, *(name.partition("/")[0] for name in files)}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name not in known:
            yield Problem("foreign", name, "not a file of the dataset; move it elsewhere")


def _inconsistent(root: Path, split: str, part: Mapping[str, Any]) -> Iterator[Problem]:
    """Contradictions between index, shards and manifest of a split: counts, shard names and offsets."""
    name = f"{split}/{INDEX}"
    try:
        index = read_index(root / split / INDEX)
        shard_of_row, offsets = [], []
        for shard in part["shards"]:
            rows = 0
            for offset, shape, dtype in shard_blocks(root / split / shard["name"]):
                size = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
                offsets += [offset + size * row for row in range(shape[0])]
                rows += shape[0]
            shard_of_row += [shard["name"]] * rows
            if rows != shard["rows"]:
                text = f"{rows} rows, but {shard['rows']} in the manifest; {REMEDY}"
                yield Problem("inconsistent", f"{split}/{shard['name']}", text)
    except DataError as error:
        yield Problem("inconsistent", name, str(error))
        return
    if index["shard"].to_pylist() != shard_of_row or index["offset"].to_pylist() != offsets:
        yield Problem("inconsistent", name, f"its shards or offsets are wrong; {REMEDY}")
    if index.num_rows != part["samples"]:
        yield Problem("inconsistent", name, f"{index.num_rows} rows, but {part['samples']} in the manifest; {REMEDY}")
    classes = len(set(index["class_id"].to_pylist()))
    if classes != part["classes"]:
        yield Problem("inconsistent", name, f"{classes} classes, but {part['classes']} in the manifest; {REMEDY}")
