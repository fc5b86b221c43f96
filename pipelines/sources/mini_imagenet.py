"""Mini-ImageNet (Vinyals et al. 2016) in the split of Ravi & Larochelle 2017: 64, 16 and 20 classes of 600 images.

It is read in all common layouts, which are detected by their file names:

- `images/` (or `images.zip`, `images.tar`, …) with `train.csv`, `val.csv` and `test.csv` of lines `filename,label`, in
  one folder or one archive;
- folders `train`, `val` and `test` with one folder per class, in a folder or an archive;
- one archive per split (`train.zip`, `val.tar`, …) with one folder per class;
- `mini-imagenet-cache-train.pkl` and the two other caches (`pipelines.sources.mini_imagenet_pickle`).
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from metagmvae.pipelines.archives.reader import ARCHIVES, Entry, list_entries, read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.sources.image_decoding import SUFFIXES, apply_preprocessing
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache
from metagmvae.pipelines.sources.source import ImageSource, check_integer, first_few, source_fingerprint

CLASSES = {"train": 64, "validation": 16, "test": 20}
IMAGES_PER_CLASS = 600
SPLIT_NAMES = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
"""Names of the splits in files and folders."""
CACHE = "mini-imagenet-cache-{}.pkl"
LAYOUTS = "images/ with train.csv, val.csv, test.csv; folders or archives train, val, test; mini-imagenet-cache-*.pkl"
IMAGES = "images"


class LocatedEntry(NamedTuple):
    """An image file in a folder or archive."""

    root: str
    entry: Entry

    @property
    def path(self) -> PurePosixPath:
        """Path below the root."""
        return PurePosixPath(self.entry.name)


class LabelledImage(NamedTuple):
    """An image with its class; the entry has its key, CRC-32 and size."""

    label: str
    entry: Entry
    load: Callable[[], np.ndarray]


def open_mini_imagenet(source: str | None = None, *, size: int = 84, allow_missing: bool = False) -> ImageSource:
    """Read Mini-ImageNet: uint8, (3, size, size), cropped to centred squares.

    Args:
        source: folder or archive in one of the layouts above.
        size: side in pixels.
        allow_missing: accept missing classes and images.

    Raises:
        DataError: `source` is None, the layout is unknown, or files, images or classes are missing.
    """
    check_integer("size", size, 1)
    if source is None:
        raise DataError("Mini-ImageNet cannot be downloaded for licence reasons; give your copy with --source")
    root = Path(source)
    paths = {split: root / CACHE.format(names[0]) for split, names in SPLIT_NAMES.items()}
    caches = {split: str(path.absolute()) for split, path in paths.items() if path.is_file()}
    options: dict[str, object] = {"size": size}
    if caches:
        images = {split: _images_of_cache(path, size) for split, path in caches.items()}
        options["layout"] = "cache"
    else:
        images = {split: _images_of_files(files, size) for split, files in _files_by_split(root).items()}
    report = _report(source, {split: Counter(image.label for image in part) for split, part in images.items()})
    if report["missing"] and not allow_missing:
        problems = "; ".join(report["missing"])
        raise DataError(f"{source}: {problems}; download it again, or use it with --allow-missing")
    splits = {split: [ImageRecord(i.entry.name, i.label, i.load) for i in part] for split, part in images.items()}
    content = [(split, image.entry) for split, part in images.items() for image in part]
    fingerprint = source_fingerprint("mini-imagenet", content, options)
    return ImageSource("mini-imagenet", (3, size, size), splits, fingerprint, report, _preprocessing(size))


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
        )
        for label, file in sorted(files, key=lambda item: (item[0], item[1].path.name))
    ]


def _files_by_split(root: Path) -> dict[str, list[tuple[str, LocatedEntry]]]:
    """(class, file) of all images by split, in any layout of image files."""
    files: dict[str, list[LocatedEntry]] = {split: [] for split in CLASSES}
    unassigned: list[LocatedEntry] = []
    csv_files: dict[str, str] = {}
    for name, path in _archives(root).items():
        part = unassigned if name == IMAGES else files[name]
        part += [LocatedEntry(str(path), entry) for entry in list_entries(path, SUFFIXES)]
    for entry in list_entries(root, (*SUFFIXES, ".csv")):
        if not entry.name.endswith(".csv"):
            unassigned.append(LocatedEntry(str(root), entry))
        elif split := _split_of(PurePosixPath(entry.name).stem):
            csv_files[split] = entry.name
    if unassigned and csv_files:
        return _assign_by_csv(root, unassigned, csv_files)
    for file in unassigned:
        split = next(filter(None, map(_split_of, file.path.parts[:-2])), None)
        if split is None:
            raise DataError(
                f"{root}: {file.entry.name} is not in a folder of a class in a folder of a split; layouts: {LAYOUTS}"
            )
        files[split].append(file)
    if not any(files.values()):
        raise DataError(f"{root}: no Mini-ImageNet found; layouts: {LAYOUTS}")
    return {split: [(file.path.parent.name, file) for file in part] for split, part in files.items() if part}


def _archives(root: Path) -> dict[str, Path]:
    """Archives in the folder `root`: one of each split, and `images`."""
    archives: dict[str, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        suffix = next((end for end in ARCHIVES if path.name.lower().endswith(end)), None)
        stem = path.name[: -len(suffix)].lower() if suffix else ""
        name = IMAGES if stem == IMAGES else _split_of(stem)
        if name is None:
            continue
        if name in archives:
            raise DataError(f"{root}: two archives of {name}, {archives[name].name} and {path.name}; remove one")
        archives[name] = path
    return archives


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _assign_by_csv(
    root: Path, files: list[LocatedEntry], csv_files: Mapping[str, str]
) -> dict[str, list[tuple[str, LocatedEntry]]]:
    by_name = {file.path.name: file for file in files}
    assigned: dict[str, list[tuple[str, LocatedEntry]]] = {}
    for split in [split for split in CLASSES if split in csv_files]:
        rows = list(_csv_rows(root, csv_files[split]))
        if missing := [name for name, _ in rows if name not in by_name]:
            raise DataError(
                f"{root}: {len(missing)} files of {csv_files[split]} are missing: {first_few(missing)}; download the "
                "images again"
            )
        assigned[split] = [(label, by_name[name]) for name, label in rows]
    return assigned


def _csv_rows(root: Path, csv_file: str) -> Iterator[tuple[str, str]]:
    """(file name, class) of each line of a csv file."""
    try:
        reader = csv.DictReader(io.StringIO(read_entry(root, csv_file).decode("utf-8-sig")), strict=True)
        for row in reader:
            name, label = row.get("filename"), row.get("label")
            if not name or not label or "/" in label:
                raise DataError(f"{root}: {csv_file} line {reader.line_num} is not filename,label; download it again")
            yield name, label
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{root}: {csv_file} is not a csv file ({error}); download it again") from error


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
