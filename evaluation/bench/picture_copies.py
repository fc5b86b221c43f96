"""Writes the same pictures in the forms that `metagmvae bench loader` compares: shards of both stores, and files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from metagmvae.pipelines.records import ImageRecord
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.encoded import EncodedRows
from metagmvae.pipelines.shards.image_codec import worth_encoding
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import ImageSource

SHARDS = 8
"""Shards of encoded images, so that several workers of webdataset and of Ray Data have some to read."""


class PictureCopies(NamedTuple):
    """The same pictures in several forms."""

    files: Path
    """Class folders of image files, as torchvision's ImageFolder reads them."""
    decoded: Dataset | None
    """None, like `encoded`, if encoding saves nothing on such small images."""
    encoded: Dataset | None


def copy_pictures(dataset: Dataset, split: str, folder: Path, count: int) -> PictureCopies:
    """Write the first images of a split into a folder, in all forms."""
    records = write_image_folder(dataset, split, folder / "files", count)
    if not worth_encoding(dataset.image_shape):
        return PictureCopies(folder / "files", None, None)
    source = ImageSource("pictures", dataset.image_shape, {split: records}, dataset.fingerprint)
    write_dataset(source, folder / "decoded")
    write_dataset(source, folder / "encoded", store="encoded", shard_rows=-(-count // SHARDS))
    return PictureCopies(folder / "files", Dataset.open(folder / "decoded"), Dataset.open(folder / "encoded"))


def write_image_folder(dataset: Dataset, split: str, folder: Path, count: int) -> list[ImageRecord]:
    """Write the first images of a split as files in class folders; return their records.

    Files of an encoded dataset stay as they are, decoded images become PNG files.
    """
    images, records = dataset.images(split, "mmap"), []
    for row, label in enumerate(dataset.labels(split)[:count]):
        read = partial(images.content, row) if isinstance(images, EncodedRows) else None
        record = ImageRecord(f"{label}/{row}", str(label), partial(images.__getitem__, row), read)
        _write_file(record, folder / record.key)
        records.append(record)
    return records


def bytes_per_image(folder: Path, count: int) -> float:
    """Space of the image data in a folder, without indices and manifests."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".parquet", ".json")]
    return sum(path.stat().st_size for path in files) / count


def _write_file(record: ImageRecord, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if record.read is not None:
        content = record.read()
        path.with_suffix(".jpg" if content.startswith(b"\xff\xd8") else ".webp").write_bytes(content)
        return
    pixels: np.ndarray = record.load()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path.with_suffix(".png"))
