"""`dataset.json`, the manifest of a dataset. It may be untrusted, so all names and types are checked."""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from metagmvae.configs.credentials import redact
from metagmvae.pipelines.files import check_document, json_bytes, read_json
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.vectors import VECTORS, vector_shape

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
INDEX = "index.parquet"
DTYPES = {"images": ("uint8",), "features": ("float16", "float32")}
LATER_KEYS = ("preprocessing", "options", "images")
"""Keys that older versions did not write. They are no part of the fingerprint of a dataset."""
REMEDY = "write the dataset again"

LEAST_MEMBER_BYTES = 1024
"""Bytes of the smallest file in a tar file, with its header."""
MAX_ROW_VALUES = 2**28
"""Largest number of values of an image or feature vector."""

LOSSLESS: Literal["lossless"] = "lossless"
Quality = Literal["lossless"] | Annotated[int, Field(ge=1, le=100)]
"""How images that are stored encoded are encoded again: without loss (WebP), or the quality of JPEG."""

Count = Annotated[int, Field(ge=0, le=2**62)]
Size = Annotated[int, Field(gt=0, le=2**20)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# No name can lead out of the folder of the dataset.
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6}\.tar$")]
SplitName = Annotated[str, Field(pattern=r"^[\w-]+$")]
AttachmentName = Annotated[str, Field(pattern=r"^encoder/[\w-]+(\.[\w-]+)+$")]


class _Attachment(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: Count
    sha256: Sha256


class _Shard(_Attachment):
    name: ShardName
    rows: Count


class _Split(BaseModel):
    model_config = ConfigDict(strict=True)

    samples: Count
    classes: Count
    groups: Count | None = None
    """None: the dataset has no groups."""
    index_sha256: Sha256
    shards: list[_Shard]


class _Encoder(BaseModel):
    model_config = ConfigDict(strict=True)

    sha256: str
    encoder: str | None = None


class _Store(BaseModel):
    model_config = ConfigDict(strict=True)

    members: Literal["encoded"]
    quality: Quality


class _Manifest(BaseModel):
    """The keys that this program reads; others are allowed."""

    model_config = ConfigDict(strict=True)

    schema_version: Literal[1]
    name: str
    source_fingerprint: str
    settings: dict[str, Any] = {}
    kind: Literal["images", "features"]
    dtype: str
    image_shape: Annotated[list[Size], Field(min_length=3, max_length=3)]
    preprocessing: Preprocessing | None = None
    store: _Store | None = None
    feature_size: Size | None = None
    encoder: _Encoder | None = None
    attachments: dict[AttachmentName, _Attachment] = {}
    splits: dict[SplitName, _Split]

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.dtype not in DTYPES[self.kind]:
            raise ValueError(f"dtype of {self.kind} is {self.dtype!r}, not {' or '.join(DTYPES[self.kind])}")
        if self.kind == "features" and self.feature_size is None:
            raise ValueError("feature_size is missing")
        if self.kind == "features" and self.encoder is None:
            raise ValueError("encoder is missing")
        if self.kind == "features" and self.store is not None:
            raise ValueError("store is given, but features are not encoded images")
        of_vectors = self.encoder is not None and self.encoder.encoder == VECTORS
        if of_vectors and tuple(self.image_shape) != vector_shape(self.feature_size or 0):
            raise ValueError(f"image_shape is {self.image_shape}, but the vectors have {self.feature_size} values")
        if self.preprocessing is not None and list(self.preprocessing.image_shape) != self.image_shape:
            raise ValueError(f"preprocessing gives {self.preprocessing.image_shape}, not image_shape")
        return self

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        """Compare the counts with each other; the readers compare the sizes with the files."""
        values = self.feature_size if self.kind == "features" and self.feature_size else math.prod(self.image_shape)
        if values > MAX_ROW_VALUES:
            raise ValueError(f"image_shape is {self.image_shape}: more than {MAX_ROW_VALUES:,} values")
        row_bytes = values * (1 if self.kind == "images" else int(self.dtype.removeprefix("float")) // 8)
        if self.store is not None:
            row_bytes = LEAST_MEMBER_BYTES
        for name, split in self.splits.items():
            if split.samples != sum(shard.rows for shard in split.shards):
                raise ValueError(f"splits.{name}.samples is {split.samples:,}, but its shards have another sum of rows")
            for key, count in (("classes", split.classes), ("groups", split.groups or 0)):
                if count > split.samples:
                    raise ValueError(f"splits.{name}.{key} is {count:,} for {split.samples:,} samples")
            names = [shard.name for shard in split.shards]
            if names != sorted(set(names)):
                raise ValueError(f"splits.{name}.shards are not in the order of their names")
            for shard in split.shards:
                if shard.rows * row_bytes > shard.bytes:
                    rows = f"{shard.rows:,} rows of {row_bytes:,} bytes"
                    raise ValueError(f"splits.{name}: {shard.name} has {shard.bytes:,} bytes, too few for {rows}")
        return self


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        DataError: it has another schema version, or a name or value in it is not allowed.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path}: not a dataset of schema version {SCHEMA_VERSION}; {REMEDY}")
    check_document(_Manifest, manifest, path, REMEDY)
    return manifest


def dataset_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without `LATER_KEYS`, which manifests that were written by older versions lack.

    The source fingerprint decides their values, so nothing is lost, and the same dataset has the same fingerprint in
    all versions.
    """
    content = {key: value for key, value in manifest.items() if key not in LATER_KEYS}
    return hashlib.sha256(json_bytes(content)).hexdigest()


def dataset_files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """Name, size in bytes (None for an index) and sha256 of every file except the manifest."""
    for name, file in manifest.get("attachments", {}).items():
        yield name, file["bytes"], file["sha256"]
    for split, part in manifest["splits"].items():
        yield from split_files(split, part)


def split_files(split: str, part: Mapping[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """Name, size in bytes (None for an index) and sha256 of every file of a split."""
    yield f"{split}/{INDEX}", None, part["index_sha256"]
    for shard in part["shards"]:
        yield f"{split}/{shard['name']}", shard["bytes"], shard["sha256"]


def check_node_copy(uri: str, found: str, expected: str) -> None:
    """Check that a worker sees the dataset of its driver: each node may have a copy of its own at the same path.

    Args:
        uri: of the dataset.
        found: fingerprint of the dataset that this process has opened.
        expected: fingerprint of that of the driver.

    Raises:
        DataError: they differ.
    """
    if found != expected:
        raise DataError(
            f"{redact(uri)} on {socket.gethostname()}: is another dataset ({found[:12]}…) than the one that the "
            f"command was started with ({expected[:12]}…); copy it to this node again, or use storage that all share"
        )
