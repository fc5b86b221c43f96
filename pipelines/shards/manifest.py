"""`dataset.json`: what a data set consists of. It may come from outside: names and types are checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
INDEX = "index.parquet"
SHARD_NAME = re.compile(r"shard-\d{6}\.tar")
ATTACHED_NAME = re.compile(r"encoder/[\w-]+(\.[\w-]+)+")
DTYPES = {"images": ("uint8",), "features": ("float16", "float32")}
REMEDY = "write the data set again"


def parse_manifest(path: Path) -> Mapping[str, Any]:
    """A manifest whose names and types are what they must be; no name leads out of the folder.

    Raises:
        DataError: it is another schema version, damaged, or hostile.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path}: not a data set of schema version {SCHEMA_VERSION}")
    _check_rows(path, manifest)
    attached = manifest.get("attachments", {})
    if not isinstance(attached, dict):
        raise DataError(f"{path}: its attachments are damaged; {REMEDY}")
    for name, file in attached.items():
        if not ATTACHED_NAME.fullmatch(name) or not isinstance(file, dict) or type(file.get("bytes")) is not int:
            raise DataError(f"{path}: {name!r} is not the name of a file of ours; {REMEDY}")
        _check_digest(path, name, file.get("sha256"))
    splits = manifest.get("splits")
    if not isinstance(splits, dict):
        raise DataError(f"{path}: names no splits; {REMEDY}")
    for split, part in splits.items():
        if not re.fullmatch(r"[\w-]+", split) or not isinstance(part, dict):
            raise DataError(f"{path}: split {split!r} is not one of ours; {REMEDY}")
        shards, whole = part.get("shards"), (part.get("samples"), part.get("classes"))
        if not isinstance(shards, list) or not all(type(n) is int and n >= 0 for n in whole):
            raise DataError(f"{path}: split {split!r} is damaged; {REMEDY}")
        _check_digest(path, f"{split}/{INDEX}", part.get("index_sha256"))
        for shard in shards:
            _check_shard(path, split, shard)
    return manifest


def _check_rows(path: Path, manifest: Mapping[str, Any]) -> None:
    """What a row is."""
    shape, kind, size = (manifest.get(key) for key in ("image_shape", "kind", "feature_size"))
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise DataError(f"{path}: image_shape is {shape!r}, and must be three positive numbers; {REMEDY}")
    if kind not in DTYPES or manifest.get("dtype") not in DTYPES[kind]:
        raise DataError(f"{path}: rows of {kind!r} in {manifest.get('dtype')!r} are unknown; {REMEDY}")
    if kind == "features" and not (type(size) is int and size > 0):
        raise DataError(f"{path}: feature_size is {size!r}, and must be a positive number; {REMEDY}")


def _check_shard(path: Path, split: str, shard: Any) -> None:
    name = shard.get("name") if isinstance(shard, dict) else shard
    if not isinstance(shard, dict) or not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise DataError(f"{path}: {name!r} is not the name of a shard; {REMEDY}")
    _check_digest(path, f"{split}/{name}", shard.get("sha256"))
    if not all(type(shard.get(key)) is int for key in ("rows", "bytes")):
        raise DataError(f"{path}: {split}/{name} has no size there; {REMEDY}")


def _check_digest(path: Path, name: str, digest: Any) -> None:
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataError(f"{path}: {name} has no sha256 there; {REMEDY}")


def dataset_files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """Name, size (unknown of an index) and sha256 of every file but the manifest."""
    for name, file in manifest.get("attachments", {}).items():
        yield name, file["bytes"], file["sha256"]
    for split, part in manifest["splits"].items():
        yield from split_files(split, part)


def split_files(split: str, part: Mapping[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """The same of one split."""
    yield f"{split}/{INDEX}", None, part["index_sha256"]
    for shard in part["shards"]:
        yield f"{split}/{shard['name']}", shard["bytes"], shard["sha256"]
