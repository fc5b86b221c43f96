"""The meaning of the folders of a tree of images: splits and classes. A tree with two meanings is refused."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from metagmvae.pipelines.archives.entries import Entry
from metagmvae.pipelines.label_file import LabelRow, read_labels
from metagmvae.pipelines.records import DataError, first_few, printable
from metagmvae.pipelines.sources.splits import SplitRequest, check_class_names, divide, split_hint, split_of

RENAME = "name the split folders train, validation and test, with nothing beside them, and give classes other names"


@dataclass(frozen=True)
class FolderImage:
    """An image file, and what follows from its path."""

    file: Entry
    key: str
    """Path below the common folder of all images."""
    split: str
    folder: str
    """Path of its folder below the folder of the split."""
    class_name: str = ""
    """Empty without classes."""
    group: str = ""
    """What keeps images together, such as the patient; empty without groups."""


@dataclass(frozen=True)
class LabelRequest:
    """Where the classes of the images of a folder stand."""

    classes: bool = True
    """False: the images have none, and their folders mean nothing."""
    labels: str | None = None
    """Table of the classes (`label_file.read_labels`); None: the folders are the classes."""
    groups: str | None = None
    """Column of the table with what keeps images together in one split, such as the patient."""
    join_splits: bool = False
    """Join folders of the splits, which hold the same classes."""

    def check(self) -> None:
        """Refuse options that exclude each other.

        Raises:
            DataError: naming them.
        """
        if self.labels is not None and not self.classes:
            raise DataError("--labels gives classes and --unlabelled takes none; omit one of them")
        if self.groups is not None and self.labels is None:
            raise DataError(f"--groups {printable(self.groups)}: is a column of --labels; give --labels FILE too")
        if self.groups is not None and self.join_splits:
            raise DataError(
                "--groups divides the images and --join-splits keeps the splits of folders; omit one of them"
            )


def read_layout(source: str, entries: Sequence[Entry], request: LabelRequest) -> list[FolderImage]:
    """Images with their splits and classes; those that a table does not name are left out.

    Args:
        source: name for error messages.
        entries: the image files.
        request: of `LabelRequest.check`.

    Raises:
        DataError: the tree or the table is ambiguous, or two classes have the same name.
    """
    if request.labels is None:
        images = parse_paths(source, entries, request.classes)
    else:
        rows = read_labels(request.labels, [entry.name for entry in entries], request.groups)
        images = table_images(request.labels, entries, rows)
    if request.join_splits:
        if {image.split for image in images} == {"train"}:
            raise DataError(f"{source}: has no folders of the splits to join; omit --join-splits")
        images = [replace(image, split="train") for image in images]
    if request.labels is None and request.classes:
        images = _with_classes(source, images)
    # With groups the splits share classes, whose names must differ all the same.
    found = {("train" if request.groups else image.split, image.class_name) for image in images}
    check_class_names(request.labels or source, found - {("train", "")})
    return images


def divide_images(
    source: str, images: Sequence[FolderImage], labels: LabelRequest, request: SplitRequest, seed: int
) -> tuple[list[FolderImage], str]:
    """Images with the splits that they are divided into (`splits.divide`), and a sentence on it."""
    splits = [image.split for image in images]
    given = "as the folders are named" if labels.labels is None else "as the table says"
    splits, division = divide(
        labels.labels or source,
        splits,
        [image.class_name for image in images],
        None if labels.groups is None else [image.group for image in images],
        request,
        seed,
        given=None if set(splits) == {"train"} else given,
    )
    return [replace(image, split=split) for image, split in zip(images, splits, strict=True)], division


def parse_paths(source: str, entries: Sequence[Entry], classes: bool) -> list[FolderImage]:
    """Splits and folders of the images, without the folders that are common to all images.

    Archives often contain a single folder with everything in it.

    Args:
        source: name for error messages.
        entries: the image files.
        classes: False puts all images into `train`.

    Raises:
        DataError: folders look like splits, but not all folders beside them do, or one split has two folders.
    """
    paths = [PurePosixPath(entry.name) for entry in entries]
    common = PurePosixPath(posixpath.commonpath([path.parent for path in paths])).parts
    depth = len(common)
    if classes:
        splits = [split_of(name) for name in common]
        if len(set(splits) - {None}) > 1:
            raise DataError(f"{source}: folder {'/'.join(common)} has the names of two splits; {RENAME}")
        depth = next((number for number, split in enumerate(splits) if split), depth)
    below = [path.parts[depth:] for path in paths]
    in_splits = classes and _has_split_folders(source, {parts[:-1] for parts in below})
    return [
        FolderImage(
            entry,
            "/".join(parts),
            (split_of(parts[0]) or "train") if in_splits else "train",
            "/".join(parts[1:-1] if in_splits else parts[:-1]),
        )
        for entry, parts in zip(entries, below, strict=True)
    ]


def table_images(table: str, entries: Sequence[Entry], rows: Mapping[str, LabelRow]) -> list[FolderImage]:
    """Images with the classes and splits of a table; the class takes the place of the folder.

    Args:
        table: name for error messages.
        entries: image files.
        rows: of some of them (`label_file.read_labels`); others are left out.

    Raises:
        DataError: the name of a split is unknown, or only some rows have one.
    """
    names = sorted({row.split for row in rows.values()})
    unknown = [name for name in names if split_of(name) is None]
    if unknown and names != [""]:
        raise DataError(f"{table}: split {unknown[0]!r}; write train, validation or test in every row")
    return [
        FolderImage(entry, entry.name, split_of(row.split) or "train", row.label, row.label, row.group)
        for entry in entries
        if (row := rows.get(entry.name))
    ]


Folder = tuple[str, ...]
"""Parts of the path of a folder."""


def _has_split_folders(source: str, folders: set[Folder]) -> bool:
    """Whether the top folders are splits; refuse folders that look like splits in any other place.

    Args:
        source: name for error messages.
        folders: folders that contain images.
    """
    subfolders: dict[Folder, set[str]] = {}
    for folder in folders:
        for length in range(len(folder)):
            subfolders.setdefault(folder[:length], set()).add(folder[length])
    names = sorted(subfolders.get((), ()))
    in_splits = bool(names) and () not in folders and all(map(split_of, names))
    if in_splits:
        for split in {split_of(name) for name in names}:
            same = [name for name in names if split_of(name) == split]
            if len(same) > 1:
                raise DataError(f"{source}: folders {' and '.join(same)} both stand for {split}; merge or rename them")
    for parent, children in sorted(subfolders.items()):
        if parent or not in_splits:
            split = split_of(parent[0]) if in_splits else None
            leaves = {name for name in children if (*parent, name) not in subfolders}
            _check_names(source, parent, sorted(children), split, all_leaves=leaves == children)
    return in_splits


def _check_names(source: str, parent: Folder, names: Sequence[str], split: str | None, *, all_leaves: bool) -> None:
    """Refuse subfolders of a folder that look like splits although they are not read as splits.

    Args:
        source: name for error messages.
        parent: the folder.
        names: its subfolders.
        split: the split that the folder belongs to, if the top folders are splits.
        all_leaves: whether no subfolder has subfolders.
    """
    known = [name for name in names if split_of(name)]
    similar = list(_similar_names(names))
    if not known and not similar:
        return
    repeated = len(names) == 1 and split is not None and split_of(names[0]) == split  # train/train, as in some archives
    # A train is a vehicle: one folder of this name among other folders of images is a class.
    vehicle = not similar and all_leaves and len(names) > 1 and [name.casefold() for name in known] == ["train"]
    if repeated or vehicle:
        return
    others = [name for name in names if name not in (known or similar)]
    looking = first_few(["/".join([*parent, name]) for name in known or similar])
    beside = f" beside {first_few(['/'.join([*parent, name]) for name in others])}" if others else ""
    raise DataError(f"{source}: {looking}{beside}: these folders can be splits or classes; {RENAME}")


def _similar_names(names: Sequence[str]) -> Iterator[str]:
    """Names that mention different splits and are otherwise equal, such as `seg_train` and `seg_test`."""
    hints = {name: hint for name in names if (hint := split_hint(name))}
    for name, (split, rest) in hints.items():
        if any(other_split != split and other_rest == rest for other_split, other_rest in hints.values()):
            yield name


def _with_classes(source: str, images: Sequence[FolderImage]) -> list[FolderImage]:
    """Images with their folder as the class; without one if all images of a split are in one folder.

    Raises:
        DataError: a class folder is inside another one.
    """
    folders: dict[str, set[str]] = {}
    for image in images:
        folders.setdefault(image.split, set()).add(image.folder)
    for inside in folders.values():
        for folder in sorted(inside):
            _check_leaf(source, folder, inside)
    several = {split for split, inside in folders.items() if len(inside) > 1}
    return [replace(image, class_name=image.folder) if image.split in several else image for image in images]


def _check_leaf(source: str, folder: str, inside: set[str]) -> None:
    """Refuse a class folder inside another one."""
    parents = [str(parent) for parent in PurePosixPath(folder).parents] if folder else []
    for parent in parents:
        if ("" if parent == "." else parent) in inside:
            raise DataError(
                f"{source}: {parent} and its subfolder {folder} both contain images; give each class its own folder, "
                "or use all images without classes (--unlabelled)"
            )
