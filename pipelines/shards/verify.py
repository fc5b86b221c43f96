"""Compares the files of a dataset with its manifest (`metagmvae verify`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metagmvae.pipelines.files import local_folder, reading, sha256_file
from metagmvae.pipelines.records import DataError, ProgressCallback
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.manifest import INDEX, MANIFEST, REMEDY, dataset_files, read_manifest, split_files
from metagmvae.pipelines.shards.unfinished import LOCK, PLAN

FOREIGN = "not a file of the dataset; move it elsewhere"

ProblemKind = Literal["missing", "link", "truncated", "altered", "foreign", "unfinished", "inconsistent", "unreadable"]


@dataclass(frozen=True)
class Problem:
    """One problem of a dataset."""

    kind: ProblemKind
    path: str
    """Path relative to the folder of the dataset."""
    detail: str


def verify_dataset(root: str | Path, on_progress: ProgressCallback | None = None) -> list[Problem]:
    """Compare every file of a dataset with its manifest; an intact dataset has no problems.

    Kinds of problems: `missing`: a file of the manifest does not exist. `link`: it is a link to elsewhere.
    `unreadable`: the operating system refuses to read it. `truncated`: it is too short. `altered`: it is too long, or
    its sha256 differs. `foreign`: a file is not in the manifest. `unfinished`: the writer was stopped. `inconsistent`:
    manifest, index and shards contradict each other although every file has the right sha256.

    Args:
        root: folder of the dataset.
        on_progress: called with (files compared, all files).

    Raises:
        DataError: there is no dataset, or its manifest is damaged.
    """
    root = local_folder(root)
    with reading(root):
        exists = (root / MANIFEST).exists()
    if not exists:
        if (root / PLAN).exists():
            detail = "the writer was stopped; run the same `metagmvae prepare` again to finish it"
            return [Problem("unfinished", MANIFEST, detail)]
        raise DataError(f"{root}: no {MANIFEST} there; give the folder of a dataset")
    dataset = Dataset(root, read_manifest(root / MANIFEST))
    manifest = dataset.manifest
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
            problems += _inconsistent(dataset, split)
    return problems


def _compare(path: Path, name: str, size: int | None, digest: str) -> list[Problem]:
    links = [part for part in (path, *path.parents[: name.count("/")]) if part.is_symlink()]
    if links:
        target = f"{links[0].name} is a link to {os.readlink(links[0])}"
        return [Problem("link", name, f"{target}; put the file itself there")]
    try:
        if not path.is_file():
            return [Problem("missing", name, REMEDY)]
        actual = path.stat().st_size
        if size is not None and actual != size:
            kind: ProblemKind = "truncated" if actual < size else "altered"
            return [Problem(kind, name, f"{actual} bytes instead of {size}; {REMEDY}")]
        if sha256_file(path) != digest:
            return [Problem("altered", name, f"its sha256 differs from the manifest; {REMEDY}")]
    except (DataError, OSError) as error:
        return [Problem("unreadable", name, str(error))]
    return []


def _foreign(root: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    files = [name for name, _, _ in dataset_files(manifest)]
    known = {MANIFEST, *manifest["splits"], *files, *(name.partition("/")[0] for name in files)}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name not in known:
            leftover = name in (PLAN, LOCK) or name.endswith(".tmp")
            remedy = "left by a stopped `metagmvae prepare`; run it again, or delete it" if leftover else FOREIGN
            yield Problem("foreign", name, remedy)


def _inconsistent(dataset: Dataset, split: str) -> Iterator[Problem]:
    """Contradictions between index, shards and manifest of a split, found by opening it as the readers do."""
    name = f"{split}/{INDEX}"
    try:
        index = dataset.index(split)
    except DataError as error:
        yield Problem("inconsistent", name, str(error))
        return
    names, positions = [], [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for shard in dataset.split(split)["shards"]:
        path = dataset.root / split / shard["name"]
        try:
            with open(path, "rb") as file:
                positions.append(dataset.row_positions(file, path, shard))
                if dataset.encoded:  # an image that cannot be decoded would stop a training later
                    for _ in dataset.stream_rows(file, path, shard):
                        pass
        except DataError as error:
            yield Problem("inconsistent", f"{split}/{shard['name']}", str(error))
            return
        names.append(np.repeat(shard["name"], shard["rows"]))
    expected = {
        "shard": np.concatenate([np.empty(0, str), *names]),
        "offset": np.concatenate([offsets for offsets, _ in positions]),
        "size": np.concatenate([sizes for _, sizes in positions]),
        "row": np.arange(len(index)),
    }
    wrong = [column for column, values in expected.items() if not np.array_equal(index[column].to_numpy(), values)]
    if wrong:
        yield Problem("inconsistent", name, f"its columns {', '.join(wrong)} do not fit the shards; {REMEDY}")
    classes = dataset.split(split)["classes"]
    counts = (len(index.group_by(columns).aggregate([])) for columns in ("class_name", ["class_id", "class_name"]))
    if any(count != classes for count in counts):
        yield Problem("inconsistent", name, f"a class has several names, or several classes one name; {REMEDY}")
