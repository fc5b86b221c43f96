"""Images of NumPy files: `.npz` as MedMNIST publishes them, and arrays that a user saved; mapped into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.pipelines.arrays.file_rows import FileRows
from metagmvae.pipelines.arrays.image_arrays import Columns, ImageTable, images_opener
from metagmvae.pipelines.arrays.numpy_arrays import array_names, open_array
from metagmvae.pipelines.records import DataError, printable

PARTS = ("train", "val", "test")
"""Beginnings of the names of the arrays of MedMNIST: `train_images`, `train_labels`, `val_images`, …"""
IMAGES, LABELS = ("images", "x", "data"), ("labels", "y", "targets")
"""Names of the arrays of other files, in any case."""


def read_numpy(source: str, columns: Columns) -> ImageTable:
    """Images of a NumPy file, `.npz` or `.npy`.

    The images of MedMNIST's three parts are joined, because they have the same classes: the classes are divided, as
    those of a folder. Other `.npz` files hold `images` and, if they have classes, `labels`; a `.npy` file holds images.

    Raises:
        DataError: the file cannot be read, holds Python objects, or has arrays of other names.
    """
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source}: is a folder; give one .npz or .npy file with all images, of equal shape")
    names = array_names(path)
    parts = [part for part in PARTS if f"{part}_images" in names]
    if parts and columns.image is None:
        label = [f"{part}_labels" for part in parts]
        chosen = [f"{part}_images" for part in parts], label if set(label) <= {*names} else []
    else:
        chosen = (
            _choose(source, names, columns.image, IMAGES, "image"),
            _choose(source, names, columns.label, LABELS, "label"),
        )
    groups = [] if columns.groups is None else _choose(source, names, columns.groups, (), "groups")
    images: Any = JoinedRows(tuple(open_array(path, name) for name in chosen[0]))
    labels = [_all(open_array(path, name)) for name in (chosen[1] if columns.classes else ())]
    return ImageTable(
        images,
        np.concatenate(labels) if labels else None,
        _all(open_array(path, groups[0])) if groups else None,
        {},
    )


def _all(rows: FileRows) -> np.ndarray:
    return rows[np.arange(len(rows))]


def _choose(source: str, names: Sequence[str], given: str | None, usual: Sequence[str], meaning: str) -> list[str]:
    """The array of a meaning; without a given name, classes may be missing.

    Raises:
        DataError: it is missing, or several can be it.
    """
    found = [name for name in names if (name == given if given is not None else name.casefold() in usual)]
    if len(found) > 1 or not (found or (meaning == "label" and given is None)):
        wanted = "" if given is None else f", and none is {printable(given)}"
        remedy = "name them images and labels" if given is None else "give the name of one"
        raise DataError(f"{source}: holds the arrays {', '.join(map(printable, names))}{wanted}; {remedy}")
    return found


@dataclass(frozen=True)
class JoinedRows:
    """Rows of several arrays, one after the other."""

    parts: tuple[FileRows, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, row: int) -> np.ndarray:
        for part in self.parts:
            if row < len(part):
                return part[row]
            row -= len(part)
        raise IndexError(row)


open_npz = images_opener("npz", "NumPy file", read_numpy)
