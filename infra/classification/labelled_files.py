"""The image files of `metagmvae classify`: labelled ones, and those to classify; every file is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from metagmvae.pipelines.label_file import read_labels
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sources.image_decoding import SUFFIXES
from metagmvae.pipelines.sources.image_files import list_images, require_images

Files = tuple[Path, list[str], list[dict[str, str]]]
"""Folder or archive, names of the files to read in it, and `file` and `reason` of those that are left out."""


def labelled_files(
    support: Path, labels: Path | None = None
) -> tuple[list[str], list[str], np.ndarray, list[dict[str, str]]]:
    """Names of the classes, files in the order of the classes, their class numbers, files left out.

    Args:
        support: folder or archive of `<class>/<file>`.
        labels: table with the classes of some images in the folder (`label_file.read_labels`), whatever the
            sub-folders; the others are not meant, and therefore not left out.

    Raises:
        DataError: the folder is missing, a class folder holds no images, or there are fewer than two classes; or as
            `read_labels`.
    """
    if labels is not None:
        names, _, _ = _list(support, lambda depth: True, "")
        class_of = {file: row.label for file, row in read_labels(labels, names).items()}
        files = sorted(class_of, key=lambda file: (class_of[file], file))
        names = sorted(set(class_of.values()))
        if len(names) < 2:
            raise DataError(f"{labels}: has 1 class ({printable(names[0])}); give two or more")
        return names, files, np.array([names.index(class_of[file]) for file in files]), []
    files, left_out, folders = _list(support, lambda depth: depth == 2, "not in a class folder")
    names = sorted({file.split("/")[0] for file in files})
    empty = sorted({folder.split("/")[0] for folder in folders} - set(names))
    if empty:
        raise DataError(f"{support}: class folder {empty[0]} holds no images; add images of this class or remove it")
    if len(names) < 2:
        remedy = "give two or more, SUPPORT/<class>/*.png, or a table with --labels"
        raise DataError(f"{support}: holds {len(names)} class folders; {remedy}")
    return names, files, np.array([names.index(file.split("/")[0]) for file in files]), left_out


def query_files(query: Path, *, recursive: bool) -> Files:
    """Files to classify, directly in the folder or, if `recursive`, in its sub-folders too; or one image file.

    Raises:
        DataError: the folder is missing or holds no images.
    """
    if query.is_file() and query.suffix.lower() in SUFFIXES:
        return query.parent, [query.name], []
    files, left_out, _ = _list(query, lambda depth: recursive or depth == 1, "in a sub-folder")
    if not files:
        raise DataError(f"{query}: holds images in sub-folders only; give one of them, or --recursive")
    return query, files, left_out


def _list(root: Path, wanted: Callable[[int], bool], reason: str) -> tuple[list[str], list[dict[str, str]], list[str]]:
    """Image files at a wanted depth, files left out, and folders; `reason` is that of image files at another depth."""
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    listing = list_images(root, checksums=False)
    require_images(root, listing)
    names = [entry.name for entry in listing.entries]
    others = [(file.name, file.reason) for file in listing.left_out]
    others += [(name, reason) for name in names if not wanted(name.count("/") + 1)]
    left_out = [{"file": path_of(root, name), "reason": reason} for name, reason in sorted(others)]
    return [name for name in names if wanted(name.count("/") + 1)], left_out, listing.folders


def path_of(root: Path, name: str) -> str:
    """Return the path of a file in messages and answers."""
    return f"{root}/{name}"
