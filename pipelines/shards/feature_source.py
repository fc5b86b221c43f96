"""Dataset of features: one row for each image of a dataset of images, in the same order.

The encoder is passed in as a function. Its files are stored with the features (attachments), so that a model which is
trained on the features can later be applied to images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from metagmvae.configs.credentials import redact, with_credentials
from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, Rows
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.index import GROUP
from metagmvae.pipelines.shards.manifest import DTYPES, check_node_copy
from metagmvae.pipelines.vectors import convert, image_remedy

COPIED = ("key", "class_name", GROUP.name)
"""Columns of the index of the images that features keep."""


@dataclass(frozen=True)
class FeatureSource:
    """`RowSource` of features, which are computed block by block in the process that writes them."""

    uri: str
    """Dataset of images."""
    splits: dict[str, Sequence[ImageRecord]]
    encode: Callable[[np.ndarray], np.ndarray]
    """uint8 images (n, C, H, W) -> float32 features (n, F); picklable."""
    feature_size: int
    dtype: str
    name: str
    image_shape: tuple[int, int, int]
    preprocessing: Preprocessing | None
    """Of the dataset of images; None if it is not recorded there."""
    encoder: dict[str, Any]
    """Entry `encoder` of the manifest, with at least `sha256`."""
    fingerprint: str
    attachments: dict[str, Path] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    """Entry `images` of the manifest: name, fingerprints and options of the dataset of images."""

    permuted = True
    """The images are stored in random order; features keep it."""

    @property
    def row_shape(self) -> tuple[int]:
        return (self.feature_size,)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "kind": "features",
            "image_shape": list(self.image_shape),
            **({"preprocessing": self.preprocessing.model_dump(mode="json")} if self.preprocessing else {}),
            "feature_size": self.feature_size,
            "encoder": self.encoder,
            "images": self.images,
        }

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Encode images of a split: (n, F).

        Raises:
            DataError: a feature is not finite, or too large for `dtype`.
        """
        images = _images(self.uri, split, self.images["fingerprint"])[np.asarray(rows)]
        features = self.encode(images)
        stored, wrong = convert(features, self.dtype)
        if wrong is not None:
            row, column = wrong
            value = features[row, column]
            message = f"{redact(self.uri)}: feature {column} of image {rows[row]} of {split!r} is {value}"
            if not np.isfinite(value):
                raise DataError(f"{message}; the encoder is broken, use another checkpoint")
            raise DataError(f"{message}, too large for {self.dtype}; use --dtype float32 and another --out")
        return stored


class IndexedRecords(Sequence[ImageRecord]):
    """Records of an index, created on access: the text columns need less memory than a million objects."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        row = {name: self.table[name][index].as_py() for name in self.table.column_names}
        group = str(row.get(GROUP.name, ""))
        return ImageRecord(row["key"], row["class_name"], partial(_cannot_load, row["key"]), group=group)


@lru_cache(maxsize=8)
def _images(uri: str, split: str, fingerprint: str) -> Rows:
    """Images of a split. They are opened once per process, because a worker reads many blocks."""
    dataset = Dataset.open(uri)
    check_node_copy(uri, dataset.fingerprint, fingerprint)
    return dataset.images(split, "mmap")


def open_features(
    dataset: Dataset,
    encode: Callable[[np.ndarray], np.ndarray],
    *,
    feature_size: int,
    encoder: dict[str, Any],
    attachments: dict[str, Path] | None = None,
    dtype: str = "float16",
) -> FeatureSource:
    """Features of all splits of a dataset of images, to be written by `write_dataset`.

    Args:
        dataset: dataset of images.
        encode: uint8 (n, C, H, W) -> float32 (n, F); picklable, because it is sent to workers.
        feature_size: F.
        encoder: entry `encoder` of the manifest, with at least `sha256`.
        attachments: additional files, by their name in the dataset.
        dtype: type of the stored features, float16 or float32.

    Raises:
        DataError: the dataset contains features, or `dtype` is not supported.
    """
    if dataset.kind != "images":
        raise DataError(f"{dataset.uri}: contains {dataset.content}; {image_remedy(dataset.content)}")
    if dtype not in DTYPES["features"]:
        raise DataError(f"dtype is {dtype!r}; choose {' or '.join(DTYPES['features'])}")
    splits: dict[str, Sequence[ImageRecord]] = {
        split: IndexedRecords(index.select([name for name in COPIED if name in index.column_names]).combine_chunks())
        for split, index in ((split, dataset.index(split)) for split in dataset.splits)
    }
    content = {"images": dataset.fingerprint, "encoder": encoder["sha256"], "dtype": dtype}
    return FeatureSource(
        with_credentials(dataset.uri),  # workers on other machines open it too
        splits,
        encode,
        feature_size,
        dtype,
        f"{dataset.name} features",
        dataset.image_shape,
        dataset.preprocessing,
        encoder,
        sha256_json(content),
        attachments or {},
        {"fingerprint": dataset.fingerprint}
        | {key: dataset.manifest[key] for key in ("name", "source_fingerprint", "options") if key in dataset.manifest},
    )


def _cannot_load(key: str) -> np.ndarray:
    raise NotImplementedError(f"{key}: features are computed by FeatureSource.load_block")
