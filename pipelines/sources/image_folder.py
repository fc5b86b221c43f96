"""Anyone's own pictures: a folder, or a zip, of images with or without class folders.

What the folders mean is read off the tree, and refused where it can be read in two ways:

- all images in one place: no classes, everything is `train`;
- images in several folders: each is a class, named by its path; `fractions` splits the classes by a seeded draw;
- `train` beside `validation` (or `val`, `valid`) and `test`: the splits, each read as above.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np

from metagmvae.pipelines.archives.reader import Entry, list_entries, read_entry
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.image_decoding import MODES, SUFFIXES, decode_image
from metagmvae.pipelines.sources.source import Source, check_integer, source_fingerprint

SPLITS = ("train", "validation", "test")
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
AT_ONCE = 512
"""Images that one task decodes."""
SHOWN = 3
"""Broken images that a message names before it counts the rest."""


@dataclass(frozen=True)
class FolderImage:
    """One image file and what its place in the tree says."""

    file: Entry
    key: str
    """Path below the folders that all images share."""
    split: str
    folder: str
    """Path of its folder below the split's."""


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
) -> Source:
    """Images under a folder or in a zip, cut to a centred square, (channels, size, size).

    Every image is decoded here once, since nothing less shows which are broken: those are left out and listed
    in `report["skipped"]`.

    Args:
        source: the folder or zip.
        size: side in pixels.
        channels: 1 (grey) or 3 (RGB).
        invert: for dark strokes on a bright background.
        classes: False takes all images as unlabelled training images, whatever folders they lie in.
        fractions: of the classes for train, validation and test; None leaves all in train.
        seed: of the draw of classes.
        max_broken: largest share of images that may be left out.
        map_tasks: decodes them elsewhere (Ray tasks, say); in this process when None.

    Raises:
        DataError: an option is not possible, there are no images, too many are broken, two classes have one
            name, a class stands in two splits, or the folders can be read in two ways.
    """
    if source is None:
        raise DataError("no pictures named: name their folder or zip by --source")
    _check_options(size, channels, classes, fractions, seed, max_broken)
    entries = list_entries(source, SUFFIXES)
    if not entries:
        raise DataError(f"{source}: holds no images ({' '.join(SUFFIXES)})")
    pictures = _placed(entries, classes)
    class_of = _classes(source, pictures) if classes else {}
    split_of = _rendered(source, pictures, class_of, fractions, seed) if fractions is not None else {}
    load = partial(load_image, str(source), size=size, channels=channels, invert=invert)
    kept, skipped = _readable(source, pictures, load, max_broken, map_tasks)
    splits: dict[str, list[ImageRecord]] = {}
    content = []
    for picture in kept:
        place = (picture.split, picture.folder)
        split = split_of.get(place, picture.split)
        record = ImageRecord(picture.key, class_of.get(place, ""), partial(load, picture.file.name))
        splits.setdefault(split, []).append(record)
        content.append((split, Entry(picture.key, picture.file.crc, picture.file.size)))
    splits = {split: splits[split] for split in SPLITS if split in splits}
    options = {"size": size, "channels": channels, "invert": invert, "classes": classes}
    report: dict[str, Any] = {
        "images": {split: len(records) for split, records in splits.items()},
        "classes": {split: len({r.class_name for r in records} - {""}) for split, records in splits.items()},
        "skipped": skipped,
        "options": {**options, "fractions": fractions and list(fractions), "seed": seed, "max_broken": max_broken},
    }
    fingerprint = source_fingerprint("folder", content, options)
    return Source("folder", (channels, size, size), splits, fingerprint, report)


def load_image(root: str, name: str, *, size: int, channels: int, invert: bool) -> np.ndarray:
    """Decode one file of a folder or zip: uint8, (channels, size, size)."""
    return decode_image(read_entry(root, name), f"{root}: {name}", size=size, channels=channels, invert=invert)


def broken(load: Callable[[str], np.ndarray], names: Sequence[str]) -> list[tuple[str, str]]:
    """One task: names of images that do not decode, with the reason of each."""
    found = []
    for name in names:
        try:
            load(name)
        except DataError as error:
            found.append((name, str(error)))
    return found


def _check_options(
    size: int, channels: int, classes: bool, fractions: Sequence[float] | None, seed: int, max_broken: float
) -> None:
    check_integer("size", size, 1)
    check_integer("seed", seed, 0)
    if channels not in MODES:
        raise DataError(f"channels is {channels!r}; choose 1 (grey) or 3 (RGB)")
    if not 0 <= max_broken <= 1:
        raise DataError(f"max_broken is {max_broken}; give a share between 0 and 1")
    if fractions is None:
        return
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(f"fractions is {tuple(fractions)}; give three, for train, validation and test, that sum to 1")
    if fractions[0] == 0 or not classes:
        raise DataError("fractions split classes, and train needs some: give it a share, and leave classes on")


def _placed(entries: Sequence[Entry], classes: bool) -> list[FolderImage]:
    """Read the splits and folders off the paths.

    Folders that all images share are dropped: a zip often holds one folder with everything in it.
    """
    paths = [PurePosixPath(entry.name) for entry in entries]
    shared = paths[0].parent.parts
    for path in paths:
        same = [a == b for a, b in zip(shared, path.parent.parts, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    depth = shared.index("train") if "train" in shared and classes else len(shared)
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


def _classes(source: str, pictures: Sequence[FolderImage]) -> dict[tuple[str, str], str]:
    """Class name by (split, folder): the folder, or "" where a split has all images in one place."""
    folders: dict[str, set[str]] = {}
    for picture in pictures:
        folders.setdefault(picture.split, set()).add(picture.folder)
    class_of: dict[tuple[str, str], str] = {}
    seen: dict[str, str] = {}
    for split, inside in folders.items():
        if len(inside) == 1:
            class_of[split, next(iter(inside))] = ""
            continue
        for folder in sorted(inside):
            _check_leaf(source, folder, inside)
            # What a file system or a person would take for one name.
            name = unicodedata.normalize("NFC", folder).casefold()
            if name in seen:
                where = f"{seen[name]} and {split}/{folder}"
                raise DataError(f"{source}: two classes of one name, {where}; rename or join them, splits share none")
            seen[name] = f"{split}/{folder}"
            class_of[split, folder] = folder
    return class_of


def _check_leaf(source: str, folder: str, inside: set[str]) -> None:
    above = [str(parent) for parent in PurePosixPath(folder).parents] if folder else []
    for parent in ("" if name == "." else name for name in above):
        if parent in inside:
            raise DataError(
                f"{source}: images lie in {parent or '.'} and deeper in {folder}: give each class a folder of its own, "
                "or take all images as unlabelled (classes off)"
            )


def _rendered(
    source: str,
    pictures: Sequence[FolderImage],
    class_of: dict[tuple[str, str], str],
    fractions: Sequence[float],
    seed: int,
) -> dict[tuple[str, str], str]:
    """Split by (split, folder): a seeded draw of classes."""
    if {picture.split for picture in pictures} != {"train"}:
        raise DataError(f"{source}: has folders for its splits already; leave fractions out")
    places = sorted(place for place, name in class_of.items() if name)
    held_out = [round(len(places) * fraction) for fraction in fractions[1:]]
    counts = [len(places) - sum(held_out), *held_out]
    if any((count > 0) != (fraction > 0) for count, fraction in zip(counts, fractions, strict=True)):
        raise DataError(f"{source}: its {len(places)} classes do not split into {tuple(fractions)}; change fractions")
    names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    order = keyed_rng("folder", seed).permutation(len(places))
    return {places[row]: split for row, split in zip(order, names, strict=True)}


def _readable(
    source: str,
    pictures: Sequence[FolderImage],
    load: partial[np.ndarray],
    max_broken: float,
    map_tasks: MapTasks | None,
) -> tuple[list[FolderImage], list[dict[str, str]]]:
    """Those that decode, and the names and reasons of the others."""
    names = [picture.file.name for picture in pictures]
    tasks = [(load, names[first : first + AT_ONCE]) for first in range(0, len(names), AT_ONCE)]
    results = map_tasks(broken, tasks) if map_tasks else itertools.starmap(broken, tasks)
    reasons = {name: reason for found in results for name, reason in cast(list[tuple[str, str]], found)}
    kept = [picture for picture in pictures if picture.file.name not in reasons]
    skipped = [{"name": name, "reason": reason} for name, reason in reasons.items()]
    if not kept or len(skipped) > max_broken * len(pictures):
        more = f", and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        raise DataError(
            f"{source}: {len(skipped)} of {len(pictures)} images cannot be used, more than max_broken = {max_broken}: "
            f"{'; '.join(each['reason'] for each in skipped[:SHOWN])}{more}"
        )
    return kept, skipped
