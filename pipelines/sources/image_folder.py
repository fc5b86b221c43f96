"""A folder or an archive of images, with or without class folders.

The meaning of the folders follows from the tree (`folder_layout`); a tree that can be read in two ways is refused:

- all images in one folder: no classes, and all images are in `train`;
- images in several folders: each folder is a class, named by its path; `fractions` assigns classes to splits at random;
- folders `train`, `validation` and `test`, or other usual names of the splits (`split_names`) and nothing beside them:
  the splits, each interpreted as above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from metagmvae.pipelines.archives.entries import Entry, LeftOut
from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.folder_layout import FolderImage, class_names, parse_paths
from metagmvae.pipelines.sources.image_decoding import MODES, apply_preprocessing
from metagmvae.pipelines.sources.image_files import files_report, list_images, require_images
from metagmvae.pipelines.sources.image_scan import scan_images
from metagmvae.pipelines.sources.source import MAX_SIDE, ImageSource, check_integer, source_fingerprint
from metagmvae.pipelines.sources.split_names import SPLITS


def open_folder(
    source: str | None = None,
    *,
    size: int = 28,
    channels: int = 1,
    invert: bool = False,
    classes: bool = True,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
    max_broken: float = 0.01,
    map_tasks: MapTasks | None = None,
) -> ImageSource:
    """Read the images of a folder or archive: uint8, (channels, size, size), cropped to centred squares.

    Every image is decoded once to find broken ones. They are skipped and listed in `report["skipped"]`. `files`
    counts the files that are left out and the images of a single value.

    Args:
        source: folder or archive.
        size: side in pixels.
        channels: 1 (grey) or 3 (RGB).
        invert: replace each value by 255 - value, for dark strokes on a bright background.
        classes: False uses all images as unlabelled training images and ignores their folders.
        fractions: fractions of the classes for train, validation and test; None uses all for train.
        seed: seed of the assignment of classes to splits.
        max_broken: largest fraction of images that may be skipped.
        map_tasks: decodes images in parallel, for example as Ray tasks; None decodes them in this process.

    Raises:
        DataError: an option is invalid, there are no images, too many are broken, two classes have the same name, a
            class is in two splits, or the tree is ambiguous.
    """
    if source is None:
        raise DataError("no folder of images given; give a folder or an archive with --source")
    _check_options(size, channels, classes, fractions, seed, max_broken)
    listing = list_images(source)
    require_images(source, listing)
    images = parse_paths(source, listing.entries, classes)
    class_of = class_names(source, images) if classes else {}
    split_of = _assign_splits(source, images, class_of, fractions, seed) if fractions is not None else {}
    preprocessing = Preprocessing.of_shape((channels, size, size), invert=invert)
    scan = scan_images(source, [entry.name for entry in listing.entries], preprocessing, max_broken, map_tasks)
    load = partial(load_image, str(source), preprocessing=scan.preprocessing)
    intact = [image for image in images if image.file.name not in scan.broken]
    splits: dict[str, list[ImageRecord]] = {}
    content = []
    for image in intact:
        folder = (image.split, image.folder)
        split = split_of.get(folder, image.split)
        record = ImageRecord(image.key, class_of.get(folder, ""), partial(load, image.file.name))
        splits.setdefault(split, []).append(record)
        content.append((split, Entry(image.key, image.file.crc, image.file.size)))
    splits = {split: splits[split] for split in SPLITS if split in splits}
    options: dict[str, Any] = {"size": size, "channels": channels, "invert": invert, "classes": classes}
    report: dict[str, Any] = {
        "images": {split: len(records) for split, records in splits.items()},
        "classes": {split: len({r.class_name for r in records} - {""}) for split, records in splits.items()},
        "skipped": [{"name": name, "reason": reason} for name, reason in scan.broken.items()],
        "options": {**options, "fractions": fractions and list(fractions), "seed": seed, "max_broken": max_broken},
    }
    if scan.preprocessing != preprocessing:
        options["sixteen_bit_white"] = scan.preprocessing.sixteen_bit_white
    fingerprint = source_fingerprint("folder", content, options)
    left_out = [*listing.left_out, *(LeftOut(name, "broken") for name in scan.broken)]
    files = files_report([image.file.name for image in intact], left_out, listing.folders) | scan.report
    return ImageSource("folder", (channels, size, size), splits, fingerprint, report, scan.preprocessing, files)


def load_image(root: str, name: str, *, preprocessing: Preprocessing) -> np.ndarray:
    """Decode one file of a folder or archive: uint8, (channels, size, size)."""
    return apply_preprocessing(read_entry(root, name), f"{root}: {name}", preprocessing)


def _check_options(
    size: int, channels: int, classes: bool, fractions: Sequence[float] | None, seed: int, max_broken: float
) -> None:
    check_integer("size", size, 1, MAX_SIDE)
    check_integer("seed", seed, 0)
    if channels not in MODES:
        raise DataError(f"channels is {channels!r}; choose 1 (grey) or 3 (RGB)")
    if not 0 <= max_broken <= 1:
        raise DataError(f"max_broken is {max_broken}; give a fraction between 0 and 1")
    if fractions is None:
        return
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(f"fractions is {tuple(fractions)}; give three for train, validation and test that sum to 1")
    if fractions[0] == 0 or not classes:
        raise DataError("fractions need classes on and a positive fraction for train; change them")


def _assign_splits(
    source: str,
    images: Sequence[FolderImage],
    class_of: dict[tuple[str, str], str],
    fractions: Sequence[float],
    seed: int,
) -> dict[tuple[str, str], str]:
    """Split by (split, folder), from a seeded random order of the classes."""
    if {image.split for image in images} != {"train"}:
        raise DataError(f"{source}: already has folders for the splits; omit fractions")
    folders = sorted(folder for folder, name in class_of.items() if name)
    held_out = [round(len(folders) * fraction) for fraction in fractions[1:]]
    counts = [len(folders) - sum(held_out), *held_out]
    if any((count > 0) != (fraction > 0) for count, fraction in zip(counts, fractions, strict=True)):
        raise DataError(f"{source}: fractions {tuple(fractions)} cannot divide {len(folders)} classes; change them")
    names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    order = keyed_rng("folder", seed).permutation(len(folders))
    return {folders[row]: split for row, split in zip(order, names, strict=True)}
