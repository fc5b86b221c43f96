"""Features of a data set of images, as a data set of the same contract: one row for each image, in its order.

The encoder is injected: this package knows none. It travels with the features (attachments), so that a model that is
trained on them can take photographs later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.shards.dataset import Dataset, MappedRows

DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class FeatureSource:
    """What `write_dataset` takes: rows are encoded where they are written, block by block."""

    uri: str
    """Of the data set of images."""
    splits: dict[str, Sequence[ImageRecord]]
    encode: Callable[[np.ndarray], np.ndarray]
    """uint8 images (n, C, H, W) -> float32 features (n, F); picklable."""
    feature_size: int
    dtype: str
    name: str
    image_shape: tuple[int, int, int]
    encoder: dict[str, Any]
    """What the manifest says of the encoder; `sha256` at least."""
    fingerprint: str
    attachments: dict[str, Path] = field(default_factory=dict)

    permuted = True
    """As the images are."""

    @property
    def row_shape(self) -> tuple[int]:
        return (self.feature_size,)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "kind": "features",
            "image_shape": list(self.image_shape),
            "feature_size": self.feature_size,
            "encoder": self.encoder,
        }

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Encode images of a split: (n, F).

        Raises:
            DataError: a feature is not finite, or too large for the type.
        """
        images = _images(self.uri, split)[np.asarray(rows)]
        features = self.encode(images)
        with np.errstate(over="ignore"):
            stored = features.astype(self.dtype)
        if not np.isfinite(stored).all():
            row, column = np.argwhere(~np.isfinite(stored))[0]
            value = features[row, column]
            found = f"{self.uri}: feature {column} of image {rows[row]} of {split!r} is {value}"
            if not np.isfinite(value):
                raise DataError(f"{found}: the encoder is broken; train it again, or use another")
            raise DataError(f"{found}, which {self.dtype} cannot hold; use --dtype float32 and another --out")
        return stored


class IndexedRecords(Sequence[ImageRecord]):
    """Records made from the rows of an index when they are asked for: a column of text, not a million objects."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: Any) -> Any:
        key = self.table["key"][number].as_py()
        return ImageRecord(key, self.table["class_name"][number].as_py(), partial(_encoded_in_blocks, key))


@lru_cache(maxsize=8)
def _images(uri: str, split: str) -> np.ndarray | MappedRows:
    """Opened once per process: a worker reads many blocks."""
    return Dataset.open(uri).images(split, "mmap")


def open_features(
    dataset: Dataset,
    encode: Callable[[np.ndarray], np.ndarray],
    *,
    feature_size: int,
    encoder: dict[str, Any],
    attachments: dict[str, Path] | None = None,
    dtype: str = "float16",
) -> FeatureSource:
    """Features of all splits of a data set of images.

    Args:
        dataset: images.
        encode: uint8 (n, C, H, W) -> float32 (n, F); it travels to the workers.
        feature_size: F.
        encoder: of the manifest; `sha256` at least.
        attachments: files that go with the features, by their name in the data set.
        dtype: float16 or float32, in which features are stored.

    Raises:
        DataError: the data set holds features, or the type is another one.
    """
    if dataset.kind != "images":
        raise DataError(f"{dataset.uri}: holds features already; name the data set of the images")
    if dtype not in DTYPES:
        raise DataError(f"dtype is {dtype!r}; it is {' or '.join(DTYPES)}")
    splits: dict[str, Sequence[ImageRecord]] = {}
    for split in dataset.splits:
        splits[split] = IndexedRecords(dataset.index(split).select(["key", "class_name"]).combine_chunks())
    made_of = {"images": dataset.fingerprint, "encoder": encoder["sha256"], "dtype": dtype}
    return FeatureSource(
        dataset.uri,
        splits,
        encode,
        feature_size,
        dtype,
        f"{dataset.name} features",
        dataset.image_shape,
        encoder,
        sha256_json(made_of),
        attachments or {},
    )


def _encoded_in_blocks(key: str) -> np.ndarray:
    raise NotImplementedError(f"{key}: features are encoded in blocks, by load_block")
