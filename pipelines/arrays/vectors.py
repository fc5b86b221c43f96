"""Feature vectors of a user, from files or arrays, as the source of a dataset (`metagmvae prepare vectors`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.pipelines.archives.entries import LeftOut
from metagmvae.pipelines.arrays.image_arrays import Items, class_names
from metagmvae.pipelines.arrays.vector_checks import check_formats, column_of, scan_vectors
from metagmvae.pipelines.arrays.vector_files import SUFFIXES, VectorFile, read_vector_file
from metagmvae.pipelines.arrays.vector_source import VectorRecords, VectorSource
from metagmvae.pipelines.files import reading, sha256_json
from metagmvae.pipelines.grouped_labels import number_groups
from metagmvae.pipelines.label_file import read_row_labels
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sources.image_files import files_report
from metagmvae.pipelines.sources.source import check_integer
from metagmvae.pipelines.sources.splits import SPLITS, SplitRequest, divide, split_of
from metagmvae.pipelines.vectors import VECTORS, vector_shape

PART = re.compile(r"[-_.]\d+(-of-\d+)?$")
"""End of the names of the parts of a split: train-00000-of-00003.parquet."""


def open_vector_files(
    source: str | None = None,
    *,
    dtype: str | None = None,
    classes: bool = True,
    labels: str | None = None,
    groups: str | None = None,
    join_splits: bool = False,
    fractions: Sequence[float] | None = None,
    validation_classes: int | None = None,
    test_classes: int | None = None,
    seed: int = 0,
) -> VectorSource:
    """Vectors of a file, or of the files of a folder in the order of their names; see `read_vector_file`.

    Args:
        source: `.npy`, `.npz` or Parquet file, or a folder of them. Files named as the splits, also in parts
            (`train-0.npy`), are the splits.
        dtype: as `open_vectors`.
        classes: False leaves out classes and splits: all vectors are training vectors.
        labels: file with the class of each vector, in their order: `.npy`, or CSV with a column `label`, and a column
            `split` if wanted. None: the classes that the files hold.
        groups: column of the CSV file, else array or column of the files, whose value, such as the patient, keeps
            vectors together: as `open_vectors`.
        join_splits: as all further options, see `open_vectors`.

    Raises:
        DataError: as `read_vector_file` and `open_vectors`.
    """
    if source is None:
        raise DataError("no vectors given; give a .npy, .npz or .parquet file, or a folder of them, with --source")
    if labels is not None and not classes:
        raise DataError("--labels gives classes and --unlabelled takes none; omit one of them")
    if groups is not None and not classes:
        raise DataError(f"--groups {printable(groups)} divides classes and --unlabelled takes none; omit one of them")
    paths, left_out = _paths(Path(source))
    in_table = labels is not None and Path(labels).suffix.lower() != ".npy"
    files = [read_vector_file(path, None if in_table else groups) for path in paths]
    if labels is not None:
        files = _labelled(files, labels, groups)
    files = [file if file.split is not None else replace(file, split=split) for file, split in _by_name(files)]
    if not classes:
        files = [replace(file, labels=None, split=None) for file in files]
    report = files_report([path.name for path in paths], left_out)
    unused = sorted({name for file in files for name in file.unused})
    opened = _open_files(
        files,
        source,
        dtype,
        join_splits=join_splits,
        fractions=fractions,
        validation_classes=validation_classes,
        test_classes=test_classes,
        seed=seed,
    )
    return replace(opened, files=report | opened.files | ({"unused": unused} if unused else {}))


def open_vectors(
    vectors: Any,
    labels: Items | None = None,
    *,
    splits: Items | None = None,
    groups: Items | None = None,
    names: Items | None = None,
    dtype: str | None = None,
    **options: Any,
) -> VectorSource:
    """Vectors that Python holds, as a source of a dataset.

    Args:
        vectors: (n, F) finite numbers: an array, or what NumPy makes one of.
        labels: class of each vector, words or numbers; None: no classes, and all vectors are in `train`.
        splits: split of each vector (train, validation, test); None: `splits.divide` divides the classes or groups.
        groups: what keeps vectors together in one split, such as the patient: the vectors are divided, not the classes,
            which the splits share (`splits.divide_groups`); None: the classes are divided.
        names: of the vectors, unique; None: their rows.
        dtype: number format of the dataset, `float16` or `float32`; None: that of the vectors, which must be one of
            them.
        options: `join_splits`, to divide the classes of all splits anew; and `fractions`, `validation_classes`,
            `test_classes` and `seed`, as `image_folder.open_folder`.

    Raises:
        DataError: the vectors have another shape, widths or formats that differ, or a value that is not finite; a
            class, or with groups a group, is in several splits; or an option is invalid.
    """
    try:
        array = vectors if isinstance(vectors, np.ndarray) else np.asarray(vectors)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"vectors are no array of numbers ({reason}); give all the same number of values") from error
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"vectors have shape {array.shape}, but (number, values) is needed; reshape them")
    given = {"labels": labels, "split": splits, "groups": groups, "names": names}
    columns: Any = {key: np.atleast_1d(np.asarray(value)) for key, value in given.items() if value is not None}
    return _open_files([VectorFile(VECTORS, array, **columns)], VECTORS, dtype, **options)


def _paths(source: Path) -> tuple[list[Path], list[LeftOut]]:
    """The files to read, and those of a folder that are left out."""
    if not source.is_dir():
        return [source], []
    with reading(source):
        found = sorted(path for path in source.iterdir())
    paths = [path for path in found if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != "."]
    if not paths:
        raise DataError(f"{source}: holds no {', '.join(SUFFIXES)} files; give the folder that does")
    return paths, [LeftOut(path.name, "is no file of vectors") for path in found if path not in paths]


def _by_name(files: Sequence[VectorFile]) -> list[tuple[VectorFile, list[str] | None]]:
    """Files, each with its split for every row if the files are named as the splits.

    Raises:
        DataError: only some are.
    """
    named = [split_of(PART.sub("", Path(file.name).stem)) for file in files]
    if len(files) == 1 or not any(named):
        return [(file, None) for file in files]
    if not all(named):
        wrong = files[named.index(None)].name
        raise DataError(f"{wrong}: other files are named as splits; name all of them train, validation or test")
    return [(file, [split or ""] * len(file.rows)) for file, split in zip(files, named, strict=True)]


def _labelled(files: Sequence[VectorFile], labels: str, groups: str | None) -> list[VectorFile]:
    """Files with the classes, and splits and groups if it has them, of a file of labels."""
    known = [file.name for file in files if file.labels is not None]
    if known:
        raise DataError(f"--labels {labels}: {known[0]} holds classes too; omit --labels, or remove them there")
    count = sum(len(file.rows) for file in files)
    columns: dict[str, Any] = {}
    if Path(labels).suffix.lower() == ".npy":
        try:
            with open(labels, "rb") as content:
                found = np.load(content, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "no array of numbers or words; Python objects are never read"
            raise DataError(f"{labels}: cannot be read ({reason}); give a .npy or .csv file") from error
        if found.ndim > 2 or len(found.ravel()) != count:
            raise DataError(
                f"{labels}: shape {found.shape} for {count:,} vectors; give one class for each, in their order"
            )
        columns["labels"] = found
    else:
        table = read_row_labels(labels, count, groups)
        columns["labels"] = [row.label for row in table]
        columns |= {"split": [row.split for row in table]} if any(row.split for row in table) else {}
        columns |= {"groups": [row.group for row in table]} if groups is not None else {}
    given, first = [], 0
    for file in files:
        rows = slice(first, first + len(file.rows))
        given.append(replace(file, **{key: values[rows] for key, values in columns.items()}))
        first = rows.stop
    return given


def _open_files(
    files: Sequence[VectorFile],
    name: str,
    dtype: str | None,
    *,
    join_splits: bool = False,
    fractions: Sequence[float] | None = None,
    validation_classes: int | None = None,
    test_classes: int | None = None,
    seed: int = 0,
) -> VectorSource:
    request = SplitRequest(fractions, validation_classes, test_classes)
    labels = column_of(files, "labels")
    request.check(labels is not None)
    check_integer("seed", seed, 0)
    dtype = check_formats(files, dtype)
    count = sum(len(file.rows) for file in files)
    label_of = np.array([""] * count if labels is None else class_names(labels, count, "vector"))
    all_names, class_ids = np.unique(label_of, return_inverse=True)
    groups = _groups(files, name, join_splits)
    split_of_row, division = _divide(files, name, label_of, groups, join_splits, request, seed)
    keys = _keys(files, count)
    digest, twins = scan_vectors(files, dtype, class_ids)
    positions = {split: np.flatnonzero(split_of_row == split) for split in SPLITS}
    splits: Any = {
        split: VectorRecords(rows, class_ids[rows], all_names.tolist(), keys, groups)
        for split, rows in positions.items()
        if len(rows)
    }
    content = {
        "source": VECTORS,
        "vectors": digest,
        "classes": sha256_json(label_of.tolist()),
        "splits": {split: rows.tolist() for split, rows in positions.items() if len(rows)},
        "names": None if keys is None else sha256_json(keys),
        "dtype": dtype,
        **({} if groups is None else {"groups": number_groups(groups)}),
    }
    shape = vector_shape(files[0].rows.shape[1])
    report = {"division": division} | twins
    rows = tuple((file.name, file.rows) for file in files)
    return VectorSource(VECTORS, shape, splits, sha256_json(content), files=report, rows=rows, dtype=dtype)


def _groups(files: Sequence[VectorFile], name: str, join: bool) -> list[str] | None:
    """Group of each vector; None: there are none."""
    groups = column_of(files, "groups")
    if groups is None:
        return None
    if join or column_of(files, "labels") is None:
        raise DataError(f"{name}: groups need classes, and no joined splits; give labels, or omit groups")
    return class_names(groups, sum(len(file.rows) for file in files), "vector", "group")


def _divide(
    files: Sequence[VectorFile],
    name: str,
    label_of: np.ndarray,
    groups: Sequence[str] | None,
    join: bool,
    request: SplitRequest,
    seed: int,
) -> tuple[np.ndarray, str]:
    """Split of each vector, and a sentence on how they were divided."""
    count = len(label_of)
    given = column_of(files, "split")
    if given is None and join:
        raise DataError(f"{name}: has no splits to join; omit --join-splits")
    splits = ["train"] * count
    if given is not None and not join:
        meaning = {text: split_of(text) for text in set(map(str, given))}
        unknown = sorted(text for text, split in meaning.items() if split is None)
        if unknown:
            raise DataError(f"{name}: split {unknown[0]!r}; write train, validation or test for every vector")
        splits = [meaning[str(text)] or "" for text in given]
    in_splits = None if given is None or join else "as the vectors say"
    splits, division = divide(name, splits, label_of.tolist(), groups, request, seed, given=in_splits)
    return np.array(splits), division


def _keys(files: Sequence[VectorFile], count: int) -> list[str] | None:
    """Names of the vectors of all files; None: without names."""
    given = column_of(files, "names")
    if given is None:
        return None
    keys = [str(key) for key in given]
    repeated = [key for key, number in Counter(keys).items() if number > 1] if len(set(keys)) < count else []
    if repeated:
        raise DataError(f"{files[0].name}: the name {repeated[0]!r} occurs twice; give every vector its own, or none")
    return keys
