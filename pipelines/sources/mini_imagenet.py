"""Mini-ImageNet (Vinyals et al. 2016) in the split of Ravi & Larochelle 2017: 64, 16 and 20 classes of 600 images.

Read as it is found in the wild, told apart by what lies there:

- `images/` (or `images.zip`, `images.tar` and so on) beside `train.csv`, `val.csv` and `test.csv`, lines
  `filename,label`, in a folder or together in one archive;
- folders `train`, `val` and `test` (in a folder, zip or tar), a folder for each class in them;
- an archive for each split, `train.zip`, `val.tar` and so on, a folder for each class inside;
- `mini-imagenet-cache-train.pkl` and its two fellows (`pipelines.sources.mini_imagenet_pickle`).
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from metagmvae.pipelines.archives.reader import ARCHIVES, Entry, list_entries, read_entry
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.sources.image_decoding import SUFFIXES, decode_image, resize_pixels
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache
from metagmvae.pipelines.sources.source import Source, check_integer, source_fingerprint

CLASSES = {"train": 64, "validation": 16, "test": 20}
IMAGES_PER_CLASS = 600
NAMES = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
"""What the splits are called in files and folders."""
CACHE = "mini-imagenet-cache-{}.pkl"
LAYOUTS = "images/ with train.csv, val.csv, test.csv; folders or archives train, val, test; mini-imagenet-cache-*.pkl"
IMAGES = "images"
SHOWN = 3


class MiniImagenetImage(NamedTuple):
    """One image: the folder or archive it lies in, and the class that it is said to be of."""

    root: str
    entry: Entry
    label: str


def open_mini_imagenet(source: str | None = None, *, size: int = 84, allow_missing: bool = False) -> Source:
    """All images by split, cut to centred squares, (3, size, size).

    Args:
        source: folder or archive in one of the layouts above.
        size: side in pixels.
        allow_missing: take what is there where classes or images are missing.

    Raises:
        DataError: it cannot be downloaded and none was named, the layout is none of those above, a csv names files
            that are not there, or classes or images are missing (the report says which).
    """
    check_integer("size", size, 1)
    if source is None:
        raise DataError("Mini-ImageNet may not be passed on, so nothing is downloaded: name your copy by --source")
    root = Path(source)
    caches = {split: root / CACHE.format(names[0]) for split, names in NAMES.items()}
    if root.is_dir() and any(path.is_file() for path in caches.values()):
        return _from_caches({split: path for split, path in caches.items() if path.is_file()}, size, allow_missing)
    pictures = _images_of(root)
    counts = {split: dict(Counter(picture.label for picture in found)) for split, found in pictures.items()}
    report = _report(source, counts, allow_missing)
    splits = {
        split: [
            ImageRecord(f"{p.label}/{PurePosixPath(p.entry.name).name}", p.label, partial(load_image, p, size))
            for p in sorted(found, key=lambda p: (p.label, PurePosixPath(p.entry.name).name))
        ]
        for split, found in pictures.items()
    }
    content = [
        (split, Entry(f"{p.label}/{PurePosixPath(p.entry.name).name}", p.entry.crc, p.entry.size))
        for split, found in pictures.items()
        for p in sorted(found, key=lambda p: (p.label, PurePosixPath(p.entry.name).name))
    ]
    fingerprint = source_fingerprint("mini-imagenet", content, {"size": size})
    return Source("mini-imagenet", (3, size, size), splits, fingerprint, report)


def load_image(picture: MiniImagenetImage, size: int) -> np.ndarray:
    """Decode one image: uint8, (3, size, size)."""
    data = read_entry(picture.root, picture.entry.name)
    return decode_image(data, f"{picture.root}: {picture.entry.name}", size=size, channels=3)


def load_cached(path: str, row: int, size: int) -> np.ndarray:
    """One image of a cache file: uint8, (3, size, size)."""
    return resize_pixels(read_cache(path).images[row], size)


def _images_of(root: Path) -> dict[str, list[MiniImagenetImage]]:
    """Pictures by split, whichever layout of files it is."""
    archives = _archives(root)
    entries: dict[str, list[tuple[str, Entry]]] = {split: [] for split in CLASSES}
    loose: list[tuple[str, Entry]] = []
    lists: dict[str, tuple[str, str]] = {}
    for name, path in archives.items():
        found = [(str(path), entry) for entry in list_entries(path, SUFFIXES)]
        if name == IMAGES:
            loose += found
        else:
            entries[name] += found
    for entry in list_entries(root, (*SUFFIXES, ".csv")):
        listed = _split_of(PurePosixPath(entry.name).stem) if entry.name.endswith(".csv") else None
        if listed is not None:
            lists[listed] = (str(root), entry.name)
        elif not entry.name.endswith(".csv"):
            loose.append((str(root), entry))
    if loose and lists:
        return _by_split_lists(root, loose, lists)
    for place, entry in loose:
        above = [of for part in PurePosixPath(entry.name).parts[:-2] if (of := _split_of(part))]
        if not above:
            raise DataError(f"{root}: {entry.name} lies in no folder of a split and a class; known layouts: {LAYOUTS}")
        entries[above[0]].append((place, entry))
    if not any(entries.values()):
        raise DataError(f"{root}: holds no Mini-ImageNet; known layouts: {LAYOUTS}")
    return {
        split: [MiniImagenetImage(where, entry, PurePosixPath(entry.name).parent.name) for where, entry in found]
        for split, found in entries.items()
        if found
    }


def _archives(root: Path) -> dict[str, Path]:
    """The archive of each split, and of all images, where the root is a folder that holds such."""
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        suffix = next((end for end in ARCHIVES if path.name.lower().endswith(end)), None)
        stem = path.name[: -len(suffix)].lower() if suffix else ""
        name = IMAGES if stem == IMAGES else _split_of(stem)
        if name is None:
            continue
        if name in found:
            raise DataError(f"{root}: two archives of {name}, {found[name].name} and {path.name}; keep one")
        found[name] = path
    return found


def _split_of(name: str) -> str | None:
    return next((split for split, names in NAMES.items() if name.lower() in names), None)


def _by_split_lists(
    root: Path, loose: list[tuple[str, Entry]], lists: Mapping[str, tuple[str, str]]
) -> dict[str, list[MiniImagenetImage]]:
    """Split and class of each image from the csv files."""
    by_name = {PurePosixPath(entry.name).name: (where, entry) for where, entry in loose}
    pictures: dict[str, list[MiniImagenetImage]] = {}
    for split in CLASSES:
        if split not in lists:
            continue
        where, name = lists[split]
        rows = list(_rows(where, name))
        missing = [file for file, _ in rows if file not in by_name]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise DataError(
                f"{root}: {name} names {len(missing)} files that are not there: {', '.join(missing[:SHOWN])}{more}; "
                "fetch the images again"
            )
        pictures[split] = [MiniImagenetImage(*by_name[file], label) for file, label in rows]
    return pictures


def _rows(where: str, name: str) -> Iterator[tuple[str, str]]:
    """(file name, class) by line of a csv file."""
    try:
        reader = csv.DictReader(io.StringIO(read_entry(where, name).decode("utf-8-sig")), strict=True)
        for row in reader:
            file, label = row.get("filename"), row.get("label")
            if not file or not label or "/" in label:
                raise DataError(f"{where}: {name} line {reader.line_num} is not filename,label; fetch it again")
            yield file, label
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: {name} is not a csv file of filename,label ({error}); fetch it again") from error


def _report(source: str, counts: Mapping[str, Mapping[str, int]], allow_missing: bool) -> dict[str, object]:
    """What is there and what is missing.

    Raises:
        DataError: something is missing, and that is not allowed.
    """
    missing = []
    for split, wanted in CLASSES.items():
        found = counts.get(split, {})
        if len(found) != wanted:
            missing.append(f"{split} has {len(found)} of {wanted} classes")
        odd = [f"{label} {count}" for label, count in sorted(found.items()) if count != IMAGES_PER_CLASS]
        if odd:
            more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
            missing.append(
                f"{split} has classes without exactly {IMAGES_PER_CLASS} images ({', '.join(odd[:SHOWN])}{more})"
            )
    if missing and not allow_missing:
        raise DataError(f"{source}: {'; '.join(missing)}; fetch it again, or take what is there with --allow-missing")
    shared = [
        label for label, splits in Counter(label for found in counts.values() for label in found).items() if splits > 1
    ]
    if shared:
        raise DataError(f"{source}: class {shared[0]} stands in two splits; splits share no class")
    return {"classes": {split: len(found) for split, found in counts.items()}, "missing": missing}


def _from_caches(caches: Mapping[str, Path], size: int, allow_missing: bool) -> Source:
    splits, counts, content = {}, {}, []
    for split, path in caches.items():
        cache = read_cache(str(path.absolute()))
        counts[split] = {label: len(rows) for label, rows in cache.classes.items()}
        named = [(f"{label}/{row:05d}", label, row) for label, rows in sorted(cache.classes.items()) for row in rows]
        splits[split] = [
            ImageRecord(key, label, partial(load_cached, str(path.absolute()), row, size)) for key, label, row in named
        ]
        content += [(split, Entry(key, cache.checksum(row), cache.images[row].nbytes)) for key, _, row in named]
    report = _report(str(next(iter(caches.values())).parent), counts, allow_missing)
    fingerprint = source_fingerprint("mini-imagenet", content, {"size": size, "layout": "cache"})
    return Source("mini-imagenet", (3, size, size), splits, fingerprint, report)
