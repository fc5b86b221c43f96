"""Mini-ImageNet (Vinyals et al. 2016) in the split of Ravi & Larochelle 2017: 64, 16 and 20 classes of 600 images.

It is read in all common layouts, which are detected by their file names:

- `images/` (or `images.zip`, `images.tar`, …) with `train.csv`, `val.csv` and `test.csv` of lines `filename,label`, in
  one folder or one archive; file names in the lists may contain folders;
- folders `train`, `val` and `test` with one folder per class, in a folder or an archive;
- one archive per split (`train.zip`, `val.tar`, …) with one folder per class;
- `mini-imagenet-cache-train.pkl` and the two other caches (`pipelines.sources.mini_imagenet_pickle`).

Two lists, archives, caches or copies of an image for the same thing are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metagmvae.pipelines.archives.reader import Entry, read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, first_few
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.pipelines.sources.image_files import files_report
from metagmvae.pipelines.sources.mini_imagenet_layout import LocatedEntry, find_layout
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache
from metagmvae.pipelines.sources.source import MAX_SIDE, ImageSource, check_integer, source_fingerprint

CLASSES = {"train": 64, "validation": 16, "test": 20}
IMAGES_PER_CLASS = 600


class LabelledImage(NamedTuple):
    """An image with its class; the entry has its key, CRC-32 and size."""

    label: str
    entry: Entry
    load: Callable[[], np.ndarray]
    read: Callable[[], bytes] | None
    """Content of its file; None for an image of a cache."""


def open_mini_imagenet(source: str | None = None, *, size: int = 84, allow_missing: bool = False) -> ImageSource:
    """Read Mini-ImageNet: uint8, (3, size, size), cropped to centred squares.

    Args:
        source: folder or archive in one of the layouts above.
        size: side in pixels.
        allow_missing: accept missing classes and images.

    Raises:
        DataError: `source` is None, the layout is unknown, or files, images or classes are missing.
    """
    check_integer("size", size, 1, MAX_SIDE)
    if source is None:
        raise DataError("Mini-ImageNet cannot be downloaded for licence reasons; give your copy with --source")
    layout = find_layout(Path(source))
    options: dict[str, object] = {"size": size}
    if layout.caches:
        images = {split: _images_of_cache(path, size) for split, path in layout.caches.items()}
        options["layout"] = "cache"
        read = list(layout.caches.values())
    else:
        images = {split: _images_of_files(files, size) for split, files in layout.images.items()}
        read = [file.full_name for files in layout.images.values() for _, file in files]
    report = _report(source, {split: Counter(image.label for image in part) for split, part in images.items()})
    if report["missing"] and not allow_missing:
        problems = "; ".join(report["missing"])
        raise DataError(f"{source}: {problems}; download it again, or use it with --allow-missing")
    splits = {
        split: [ImageRecord(image.entry.name, image.label, image.load, image.read) for image in part]
        for split, part in images.items()
    }
    content = [(split, image.entry) for split, part in images.items() for image in part]
    fingerprint = source_fingerprint("mini-imagenet", content, options)
    files = files_report(read, layout.left_out, [])
    return ImageSource("mini-imagenet", (3, size, size), splits, fingerprint, report, _preprocessing(size), files)


def load_file(file: LocatedEntry, size: int) -> np.ndarray:
    """Decode one image file: uint8, (3, size, size)."""
    data = read_entry(file.root, file.entry.name)
    return apply_preprocessing(data, f"{file.root}: {file.entry.name}", _preprocessing(size))


def load_cached(path: str, row: int, size: int) -> np.ndarray:
    """One image of a cache file: uint8, (3, size, size)."""
    pixels = read_cache(path).images[row].transpose(2, 0, 1)
    return apply_preprocessing(pixels, f"{path}: image {row}", _preprocessing(size))


def _preprocessing(size: int) -> Preprocessing:
    return Preprocessing.of_shape((3, size, size), invert=False)


def _images_of_cache(path: str, size: int) -> list[LabelledImage]:
    cache = read_cache(path)
    return [
        LabelledImage(
            label,
            Entry(f"{label}/{row:05d}", cache.checksum(row), cache.images[row].nbytes),
            partial(load_cached, path, row, size),
            None,
        )
        for label, rows in sorted(cache.classes.items())
        for row in rows
    ]


def _images_of_files(files: list[tuple[str, LocatedEntry]], size: int) -> list[LabelledImage]:
    return [
        LabelledImage(
            label,
            Entry(f"{label}/{file.path.name}", file.entry.crc, file.entry.size),
            partial(load_file, file, size),
            partial(read_entry, file.root, file.entry.name),
        )
        for label, file in sorted(files, key=lambda item: (item[0], item[1].path.name))
    ]


def _report(source: str, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Numbers of classes, and what is missing.

    Args:
        source: name for error messages.
        counts: number of images by split and class.

    Raises:
        DataError: a class is in two splits.
    """
    missing = []
    for split, expected in CLASSES.items():
        part = counts.get(split, {})
        if len(part) != expected:
            missing.append(f"{split} has {len(part)} of {expected} classes")
        incomplete = [f"{label} {count}" for label, count in sorted(part.items()) if count != IMAGES_PER_CLASS]
        if incomplete:
            missing.append(f"{split} has classes without exactly {IMAGES_PER_CLASS} images ({first_few(incomplete)})")
    for label, splits in Counter(label for part in counts.values() for label in part).items():
        if splits > 1:
            raise DataError(f"{source}: class {label} is in two splits; remove it from one")
    return {"classes": {split: len(part) for split, part in counts.items()}, "missing": missing}
