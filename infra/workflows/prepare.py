"""Where the shards of a dataset are written, and what `metagmvae prepare` answers."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metagmvae.pipelines.files import exclusive_lock, local_folder
from metagmvae.pipelines.shards.image_codec import LOSSY_JPEG
from metagmvae.pipelines.shards.object_store import RemotePrefix, cache_root, is_remote, publish
from metagmvae.pipelines.shards.row_source import RowSource
from metagmvae.pipelines.shards.writer import check_dataset, write_dataset
from metagmvae.pipelines.sources.source import ImageSource


def write_source(source: ImageSource, out: str, **options: Any) -> dict[str, Any]:
    """Write images as a dataset; return the answer of `metagmvae prepare`.

    Args:
        source: the images.
        out: folder or `s3://bucket/prefix`.
        options: of `write_dataset`.
    """
    with open_output(out) as (folder, uri):
        manifest = write_dataset(source, folder, **options)
    return {
        "data": uri,
        "name": manifest["name"],
        **_shape(manifest),
        "samples": {split: part["samples"] for split, part in manifest["splits"].items()},
        "classes": {split: len({r.class_name for r in records} - {""}) for split, records in source.splits.items()},
        **({"groups": groups} if (groups := _groups(manifest)) else {}),
        "shards": {split: len(part["shards"]) for split, part in manifest["splits"].items()},
        **_encoded_images(manifest),
        "skipped": source.report.get("skipped", []),
        **source.files,
        **({"missing": source.report["missing"]} if source.report.get("missing") else {}),
    }


def describe_output(source: RowSource, out: str, **options: Any) -> dict[str, Any]:
    """Check a dataset as before writing it, and say what would be written; nothing is."""
    remote = RemotePrefix(out) if is_remote(out) else None
    if remote is not None:
        remote.sizes()  # fails if the store refuses access
    else:
        check_dataset(source, local_folder(out).absolute(), **options)
    return {
        "dry run": "all checks passed, nothing was written",
        "data": remote.uri if remote is not None else str(local_folder(out).absolute()),
        "name": source.name,
        "rows": " x ".join(map(str, source.row_shape)) + f" {source.dtype}",
        "samples": {split: len(records) for split, records in source.splits.items()},
    }


@contextmanager
def open_output(out: str) -> Iterator[tuple[Path, str]]:
    """Yield the folder to write shards into and the URI of the dataset; upload the folder if `out` is remote.

    Shards for an object store are written into the cache folder first. If the command is stopped, the same command
    continues with the shards that are already there.
    """
    if not is_remote(out):
        folder = local_folder(out).absolute()
        yield folder, str(folder)
        return
    remote = RemotePrefix(out)
    remote.sizes()  # fails early if the store refuses access
    folder = cache_root() / "writing" / hashlib.sha256(remote.uri.encode()).hexdigest()[:16]
    busy = f"{remote.uri}: another process of this machine writes this dataset; wait for it, or choose another --out"
    with exclusive_lock(folder.with_suffix(".lock"), busy):
        yield folder, remote.uri
        publish(folder, out)
        shutil.rmtree(folder)


def _groups(manifest: dict[str, Any]) -> dict[str, int]:
    """Number of groups, such as patients, by split; empty without groups."""
    return {split: part["groups"] for split, part in manifest["splits"].items() if "groups" in part}


def _shape(manifest: dict[str, Any]) -> dict[str, Any]:
    """Shape of the images, or size and number format of the vectors."""
    if manifest["kind"] == "features":
        return {key: manifest[key] for key in ("feature_size", "dtype")}
    return {"image_shape": manifest["image_shape"], "channels": manifest["image_shape"][0]}


def _encoded_images(manifest: dict[str, Any]) -> dict[str, Any]:
    """How the images of a dataset are encoded, and what that saves and loses; nothing if they are stored as pixels."""
    if "store" not in manifest:
        return {}
    formats: Counter[str] = Counter()
    for part in manifest["splits"].values():
        formats.update(part["formats"])
    lossy, total = formats[LOSSY_JPEG.removeprefix(".")], sum(formats.values())
    quality = manifest["store"]["quality"]
    loss = f"{lossy:,} of {total:,} images were encoded again with loss (JPEG of quality {quality})"
    shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
    return {
        "store": "encoded",
        "formats": dict(formats),
        "loss": loss if lossy else "none: every image is decoded to exactly the pixels that were prepared",
        "bytes": {
            "shards": sum(shard["bytes"] for shard in shards),
            "pixels": total * math.prod(manifest["image_shape"]),
        },
    }
