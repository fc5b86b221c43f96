"""Finds the files of Mini-ImageNet in every common layout: lists, folders or archives of the splits, or caches."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from metagmvae.pipelines.archives.entries import Entry, LeftOut
from metagmvae.pipelines.archives.folder import FolderFiles, is_hidden
from metagmvae.pipelines.archives.reader import ARCHIVES, HIDDEN, read_entry
from metagmvae.pipelines.records import DataError, first_few
from metagmvae.pipelines.sources.image_files import list_images
from metagmvae.pipelines.sources.splits import SPLITS, split_of

CACHE = re.compile(r"mini-?imagenet-cache-(\w+)\.(pkl|pickle)")
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

    @property
    def full_name(self) -> str:
        """Root and path, for messages."""
        return f"{self.root}/{self.entry.name}"


@dataclass
class Layout:
    """The files of the splits, in one of the layouts."""

    caches: dict[str, str] = field(default_factory=dict)
    """Absolute path of the cache of each split; if there are caches, there are no images."""
    images: dict[str, list[tuple[str, LocatedEntry]]] = field(default_factory=dict)
    """(class, file) of all images by split."""
    left_out: list[LeftOut] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def find_layout(root: Path) -> Layout:
    """Find the files of a folder or an archive.

    Raises:
        DataError: no layout fits, or two of them do: two lists, archives, caches or images for the same thing.
    """
    names = _visible_files(root)
    caches = _by_split(root, "caches", ((name, _cache_split(name)) for name in names))
    if caches:
        others = [LeftOut(name, "not needed beside the caches") for name in names if name not in caches.values()]
        return Layout({split: str((root / name).absolute()) for split, name in caches.items()}, left_out=others)
    archives = _by_split(root, "archives", ((name, _archive_part(name)) for name in names))
    layout = Layout()
    files: dict[str, list[LocatedEntry]] = {split: [] for split in SPLITS}
    unassigned: list[LocatedEntry] = []
    for part, name in archives.items():
        listing = list_images(root / name)
        (unassigned if part == IMAGES else files[part]).extend(
            LocatedEntry(str(root / name), e) for e in listing.entries
        )
        layout.left_out += [LeftOut(f"{name}/{file.name}", file.reason) for file in listing.left_out]
        layout.folders += [f"{name}/{folder}" for folder in listing.folders]
    listing = list_images(root, (".csv",))
    layout.folders += listing.folders
    layout.left_out += [file for file in listing.left_out if file.name not in archives.values()]
    tables = [entry.name for entry in listing.entries if entry.name.lower().endswith(".csv")]
    unassigned += [LocatedEntry(str(root), entry) for entry in listing.entries if entry.name not in tables]
    lists = _by_split(root, "lists", ((name, split_of(PurePosixPath(name).stem)) for name in tables))
    if unassigned and lists:
        layout.images = _assign_by_lists(root, unassigned, lists)
        used = {file for part in layout.images.values() for _, file in part}
        layout.left_out += [LeftOut(f.entry.name, "in no list of a split") for f in unassigned if f not in used]
        layout.left_out += [LeftOut(name, "suffix .csv") for name in tables if name not in lists.values()]
        return layout
    layout.left_out += [LeftOut(name, "list that is not needed") for name in tables]
    for file in unassigned:
        files[_split_by_folder(root, file)].append(file)
    if not any(files.values()):
        raise DataError(f"{root}: no Mini-ImageNet found{_hint(layout.left_out)}; layouts: {LAYOUTS}")
    layout.images = {split: [(file.path.parent.name, file) for file in part] for split, part in files.items() if part}
    _check_images_once(root, layout.images)
    return layout


def _visible_files(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    names = (name for name, kind in FolderFiles(root).names() if kind != "folder")
    return sorted(name for name in names if not any(map(is_hidden, PurePosixPath(name).parts)))


def _cache_split(name: str) -> str | None:
    match = CACHE.fullmatch(PurePosixPath(name).name.lower())
    return split_of(match[1]) if match else None


def _archive_part(name: str) -> str | None:
    """The split of an archive, or `images`."""
    name = PurePosixPath(name).name.lower()
    suffix = next((end for end in ARCHIVES if name.endswith(end)), None)
    stem = name[: -len(suffix)] if suffix else ""
    return IMAGES if stem == IMAGES else split_of(stem)


def _by_split(root: Path, kind: str, parts: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Name of the file of each split; refuse two files of one."""
    names_of: dict[str, list[str]] = {part: [] for part in (*SPLITS, IMAGES)}
    for name, part in parts:
        if part is not None:
            names_of[part].append(name)
    for part, names in names_of.items():
        if len(names) > 1:
            raise DataError(f"{root}: two {kind} of {part}, {names[0]} and {names[1]}; remove one")
    return {part: names[0] for part, names in names_of.items() if names}


def _hint(left_out: Iterable[LeftOut]) -> str:
    """What an archive without images contains instead."""
    names = [file.name for file in left_out if file.reason != HIDDEN]
    if caches := [name for name in names if _cache_split(name)]:
        return f" (it contains {first_few(caches)}: unpack it and give the folder)"
    return f" (it contains {first_few(names)})" if names else ""


def _split_by_folder(root: Path, file: LocatedEntry) -> str:
    splits = {split for name in file.path.parts[:-2] if (split := split_of(name))}
    if not splits:
        raise DataError(
            f"{root}: {file.entry.name} is not in a folder of a class in a folder of a split; layouts: {LAYOUTS}"
        )
    if len(splits) > 1:
        raise DataError(f"{root}: {file.entry.name} is in folders of two splits; rename the outer folder")
    return splits.pop()


def _check_images_once(root: Path, images: Mapping[str, list[tuple[str, LocatedEntry]]]) -> None:
    for part in images.values():
        file_of: dict[tuple[str, str], LocatedEntry] = {}
        for label, file in part:
            other = file_of.setdefault((label, file.path.name), file)
            if other is not file:
                raise DataError(f"{root}: an image is there twice, {other.full_name} and {file.full_name}; remove one")


def _assign_by_lists(
    root: Path, files: list[LocatedEntry], lists: Mapping[str, str]
) -> dict[str, list[tuple[str, LocatedEntry]]]:
    by_name: dict[str, list[LocatedEntry]] = {}
    for file in files:
        by_name.setdefault(file.path.name, []).append(file)
    assigned: dict[str, list[tuple[str, LocatedEntry]]] = {}
    for split, name in lists.items():
        rows = list(_list_rows(root, name))
        found = [(label, _listed_file(root, name, path, by_name)) for path, label in rows]
        if missing := [path for (path, _), (_, file) in zip(rows, found, strict=True) if file is None]:
            raise DataError(
                f"{root}: {len(missing)} files of {name} are missing: {first_few(missing)}; the {len(files)} images "
                f"have names such as {files[0].entry.name}; download them again, or remove the lists if the folders "
                "are the splits"
            )
        assigned[split] = [(label, file) for label, file in found if file is not None]
        for _, file in assigned[split]:
            other = {split_of(part) for part in file.path.parts[:-1]} - {None, split}
            if other:
                raise DataError(
                    f"{root}: {name} names {file.entry.name}, which is in a folder of {other.pop()}; remove one"
                )
    return assigned


def _listed_file(root: Path, table: str, path: str, by_name: Mapping[str, list[LocatedEntry]]) -> LocatedEntry | None:
    """The file of a row, whose name may contain folders; refuse two files."""
    parts = PurePosixPath(path).parts
    files = by_name.get(parts[-1], [])
    in_folder = [file for file in files if file.path.parts[-len(parts) :] == parts]
    files = in_folder or files
    if len(files) > 1:
        both = f"{files[0].full_name} and {files[1].full_name}"
        raise DataError(f"{root}: {path} of {table} is there twice, {both}; remove one")
    return files[0] if files else None


def _list_rows(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """(path of the file, class) of each line of a list."""
    remedy = "is not filename,label; download it again"
    try:
        reader = csv.DictReader(io.StringIO(read_entry(root, name).decode("utf-8-sig")), strict=True)
        reader.fieldnames = [heading.strip().casefold() for heading in reader.fieldnames or ()]
        if not {"filename", "label"} <= set(reader.fieldnames):
            raise DataError(f"{root}: {name} line 1 {remedy}")
        for row in reader:
            path, label = (row.get("filename") or "").strip().replace("\\", "/"), (row.get("label") or "").strip()
            if not PurePosixPath(path).name or not label or "/" in label:
                raise DataError(f"{root}: {name} line {reader.line_num} {remedy}")
            yield path, label
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{root}: {name} is not a csv file ({error}); download it again") from error
