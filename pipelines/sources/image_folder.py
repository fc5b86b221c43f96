"""A folder or an archive of images, with or without class folders.

The meaning of the folders follows from the tree; an ambiguous tree is refused:

- all images in one folder: no classes, and all images are in `train`;
- images in several folders: each folder is a class, named by its path; `fractions` assigns classes to splits at random;
- folders `train`, `validation` (or `val`, `valid`) and `test`: the splits, each interpreted as above.
"""

from __future__ import annotations

import itertools
import math
import posixpath
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np

from metagmvae.pipelines.archives.reader import Entry, list_entries, read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.image_decoding import MODES, SUFFIXES, apply_preprocessing
from metagmvae.pipelines.sources.source import ImageSource, check_integer, first_few, source_fingerprint

SPLITS = ("train", "validation", "test")
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
IMAGES_PER_TASK = 512
"""Images that one task decodes."""


@dataclass(frozen=True)
class FolderImage:
    """An image file, and what follows from its path."""

    file: Entry
    key: str
    """Path below the common folder of all images."""
    split: str
    folder: str
    """Path of its folder below the folder of the split."""


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

    Every image is decoded once to find broken ones. They are skipped and listed in `report["skipped"]`.

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
    entries = list_entries(source, SUFFIXES)
    if not entries:
        raise DataError(f"{source}: contains no images ({' '.join(SUFFIXES)})")
    images = _parse_paths(entries, classes)
    class_of = _classes(source, images) if classes else {}
    split_of = _assign_splits(source, images, class_of, fractions, seed) if fractions is not None else {}
    preprocessing = Preprocessing.of_shape((channels, size, size), invert=invert)
    load = partial(load_image, str(source), preprocessing=preprocessing)
    intact, skipped = _skip_broken(source, images, load, max_broken, map_tasks)
    splits: dict[str, list[ImageRecord]] = {}
    content = []
    for image in intact:
        folder = (image.split, image.folder)
        split = split_of.get(folder, image.split)
        record = ImageRecord(image.key, class_of.get(folder, ""), partial(load, image.file.name))
        splits.setdefault(split, []).append(record)
        content.append((split, Entry(image.key, image.file.crc, image.file.size)))
    splits = {split: splits[split] for split in SPLITS if split in splits}
    options = {"size": size, "channels": channels, "invert": invert, "classes": classes}
    report: dict[str, Any] = {
        "images": {split: len(records) for split, records in splits.items()},
        "classes": {split: len({r.class_name for r in records} - {""}) for split, records in splits.items()},
        "skipped": skipped,
        "options": {**options, "fractions": fractions and list(fractions), "seed": seed, "max_broken": max_broken},
    }
    fingerprint = source_fingerprint("folder", content, options)
    return ImageSource("folder", (channels, size, size), splits, fingerprint, report, preprocessing)


def load_image(root: str, name: str, *, preprocessing: Preprocessing) -> np.ndarray:
    """Decode one file of a folder or archive: uint8, (channels, size, size)."""
    return apply_preprocessing(read_entry(root, name), f"{root}: {name}", preprocessing)


def find_broken(load: Callable[[str], np.ndarray], names: Sequence[str]) -> list[tuple[str, str]]:
    """Names of the images that cannot be decoded, each with the reason. This is one task for a worker."""
    broken = []
    for name in names:
        try:
            load(name)
        except DataError as error:
            broken.append((name, str(error)))
    return broken


def _check_options(
    size: int, channels: int, classes: bool, fractions: Sequence[float] | None, seed: int, max_broken: float
) -> None:
    check_integer("size", size, 1)
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


def _parse_paths(entries: Sequence[Entry], classes: bool) -> list[FolderImage]:
    """Splits and folders of the images, without the folders that are common to all images.

    Archives often contain a single folder with everything in it.
    """
    paths = [PurePosixPath(entry.name) for entry in entries]
    common = PurePosixPath(posixpath.commonpath([path.parent for path in paths])).parts
    depth = common.index("train") if "train" in common and classes else len(common)
    below = [path.parts[depth:] for path in paths]
    tops = {parts[0] if len(parts) > 1 else "" for parts in below}
    split_folders = classes and "train" in tops and tops <= SPLIT_FOLDERS.keys()
    return [
        FolderImage(
            entry,
            "/".join(parts),
            SPLIT_FOLDERS[parts[0]] if split_folders else "train",
            "/".join(parts[1:-1] if split_folders else parts[:-1]),
        )
        for entry, parts in zip(entries, below, strict=True)
    ]


def _classes(source: str, images: Sequence[FolderImage]) -> dict[tuple[str, str], str]:
    """Class name by (split, folder): the folder, or "" if all images of a split are in one folder."""
    folders: dict[str, set[str]] = {}
    for image in images:
        folders.setdefault(image.split, set()).add(image.folder)
    class_of: dict[tuple[str, str], str] = {}
    folder_of: dict[str, str] = {}
    for split, inside in folders.items():
        if len(inside) == 1:
            class_of[split, next(iter(inside))] = ""
            continue
        for folder in sorted(inside):
            _check_leaf(source, folder, inside)
            # Names that a file system or a person may confuse are equal.
            name = unicodedata.normalize("NFC", folder).casefold()
            if name in folder_of:
                both = f"{folder_of[name]} and {split}/{folder}"
                raise DataError(f"{source}: {both} are classes with the same name; rename or merge them")
            folder_of[name] = f"{split}/{folder}"
            class_of[split, folder] = folder
    return class_of


def _check_leaf(source: str, folder: str, inside: set[str]) -> None:
    """Refuse a class folder inside another one."""
    parents = [str(parent) for parent in PurePosixPath(folder).parents] if folder else []
    for parent in parents:
        if ("" if parent == "." else parent) in inside:
            raise DataError(
                f"{source}: {parent} and its subfolder {folder} both contain images; give each class its own folder, "
                "or use all images without classes (classes off)"
            )


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


def _skip_broken(
    source: str,
    images: Sequence[FolderImage],
    load: partial[np.ndarray],
    max_broken: float,
    map_tasks: MapTasks | None,
) -> tuple[list[FolderImage], list[dict[str, str]]]:
    """The images that can be decoded, and names and reasons of the others.

    Raises:
        DataError: too many images are broken.
    """
    names = [image.file.name for image in images]
    tasks = [(load, names[first : first + IMAGES_PER_TASK]) for first in range(0, len(names), IMAGES_PER_TASK)]
    results = (map_tasks or itertools.starmap)(find_broken, tasks)
    reasons = {name: reason for broken in results for name, reason in cast(list[tuple[str, str]], broken)}
    intact = [image for image in images if image.file.name not in reasons]
    skipped = [{"name": name, "reason": reason} for name, reason in reasons.items()]
    if not intact or len(skipped) > max_broken * len(images):
        raise DataError(
            f"{source}: {len(skipped)} of {len(images)} images cannot be decoded, more than max_broken = {max_broken}: "
            f"{first_few(list(reasons.values()), '; ')}"
        )
    return intact, skipped
