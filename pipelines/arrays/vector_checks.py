"""Checks of a user's feature vectors, over all files of a source: columns, number formats, classes, equal vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from metagmvae.pipelines.arrays.numpy_arrays import BLOCK_BYTES
from metagmvae.pipelines.arrays.vector_files import VectorFile
from metagmvae.pipelines.arrays.vector_source import stored_values
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.manifest import DTYPES

MOST_VALUES = 2**20
"""Largest number of values of a vector."""


def column_of(files: Sequence[VectorFile], meaning: str) -> np.ndarray | list[Any] | None:
    """Labels, splits, groups or names of all files; None if no file has them.

    Raises:
        DataError: only some files have them, or another number than vectors.
    """
    given = [getattr(file, meaning) for file in files]
    missing = [file.name for file, values in zip(files, given, strict=True) if values is None]
    if len(missing) == len(files):
        return None
    if missing:
        raise DataError(f"{missing[0]}: has no {meaning}, and other files have; give them for all files or for none")
    for file, values in zip(files, given, strict=True):
        if len(values) != len(file.rows):
            raise DataError(f"{file.name}: {len(values)} {meaning} for {len(file.rows)} vectors; give one for each")
    if len(files) == 1:
        return given[0]
    return [value for values in given for value in (values.tolist() if isinstance(values, np.ndarray) else values)]


def check_formats(files: Sequence[VectorFile], dtype: str | None) -> str:
    """Number format of the dataset, after the widths and formats of the files were compared."""
    first = files[0]
    width = first.rows.shape[1]
    if width > MOST_VALUES:
        raise DataError(f"{first.name}: vectors of {width:,} values; at most {MOST_VALUES:,} are possible")
    formats = {}
    for file in files:
        if file.rows.shape[1] != width:
            raise DataError(
                f"{file.name}: vectors have {file.rows.shape[1]} values, and those of {first.name} {width}; give "
                "vectors of one network"
            )
        formats[np.dtype(file.rows[np.arange(1)].dtype).newbyteorder("=")] = file.name
    for kind, name in formats.items():
        if kind.kind not in "iuf":
            raise DataError(f"{name}: vectors are {kind}, not numbers; save them as float32")
    if dtype is not None:
        if dtype not in DTYPES["features"]:
            raise DataError(f"dtype is {dtype!r}; choose {' or '.join(DTYPES['features'])}")
        return dtype
    if len(formats) > 1:
        both = " and ".join(f"{kind} ({name})" for kind, name in formats.items())
        raise DataError(f"vectors are {both}; give --dtype float32 to store all of them so")
    kind, name = next(iter(formats.items()))
    if kind.name not in DTYPES["features"]:
        raise DataError(f"{name}: vectors are {kind}; give --dtype float32 to store them rounded to that")
    return str(kind.name)


def scan_vectors(files: Sequence[VectorFile], dtype: str, class_ids: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Read all vectors once: sha256 of their stored values, and an account of equal vectors.

    Raises:
        DataError: a value cannot be stored, or all vectors are equal.
    """
    content, hashes = hashlib.sha256(), np.empty(len(class_ids), np.uint64)
    number = 0
    for file in files:
        rows = file.rows
        chunk = max(1, BLOCK_BYTES // (4 * rows.shape[1]))
        for first in range(0, len(rows), chunk):
            wanted = np.arange(first, min(first + chunk, len(rows)))
            block = stored_values(rows[wanted], dtype, file.name, wanted)
            for row in np.ascontiguousarray(block, np.dtype(dtype).newbyteorder("<")):
                values = row.tobytes()
                content.update(values)
                hashes[number] = int.from_bytes(hashlib.blake2b(values, digest_size=8).digest(), "little")
                number += 1
    _, first_of, group = np.unique(hashes, return_index=True, return_inverse=True)
    twins = number - len(first_of)
    if twins and len(first_of) == 1:
        raise DataError(f"{files[0].name}: all {number:,} vectors are equal; nothing can be learned from them")
    if not twins:
        return content.hexdigest(), {}
    repeated = np.setdiff1d(np.arange(number), first_of)[0]
    mixed = int((class_ids != class_ids[first_of[group]]).sum())
    same = f"row {repeated} equals row {first_of[group[repeated]]}"
    note = f"{twins:,} of {number:,} vectors equal an earlier one ({same})"
    return content.hexdigest(), {"duplicates": note + (f"; {mixed:,} have another class than it" if mixed else "")}
