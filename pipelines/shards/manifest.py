"""`dataset.json`, the manifest of a dataset. It may be untrusted, so all names and types are checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from metagmvae.configs.load import mistake_text
from metagmvae.pipelines.files import json_bytes, read_json
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
INDEX = "index.parquet"
DTYPES = {"images": ("uint8",), "features": ("float16", "float32")}
REMEDY = "write the dataset again"

Count = Annotated[int, Field(ge=0)]
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
    index_sha256: Sha256
    shards: list[_Shard]


class _Manifest(BaseModel):
    """The keys that this program reads; others are allowed."""

    model_config = ConfigDict(strict=True)

    schema_version: Literal[1]
    name: str
    kind: Literal["images", "features"]
    dtype: str
    image_shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    preprocessing: Preprocessing | None = None
    feature_size: PositiveInt | None = None
    attachments: dict[AttachmentName, _Attachment] = {}
    splits: dict[SplitName, _Split]

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.dtype not in DTYPES[self.kind]:
            raise ValueError(f"dtype of {self.kind} is {self.dtype!r}, not {' or '.join(DTYPES[self.kind])}")
        if self.kind == "features" and self.feature_size is None:
            raise ValueError("feature_size is missing")
        if self.preprocessing is not None and list(self.preprocessing.image_shape) != self.image_shape:
            raise ValueError(f"preprocessing gives {self.preprocessing.image_shape}, not image_shape")
        return self


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        DataError: it has another schema version, or a name or value in it is not allowed.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path}: not a dataset of schema version {SCHEMA_VERSION}; {REMEDY}")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise DataError(f"{path}: {mistake_text(error.errors()[0])}; {REMEDY}") from error
    return manifest


def dataset_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without `preprocessing`, which manifests that were written by older versions lack.

    The source fingerprint decides the preprocessing, so nothing is lost, and the same dataset has the same fingerprint
    in all versions.
    """
    content = {key: value for key, value in manifest.items() if key != "preprocessing"}
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
