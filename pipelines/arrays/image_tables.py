"""Images in Parquet files, as data sets of Hugging Face hold them: a column of image files, and a column of classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metagmvae.pipelines.arrays.image_arrays import open_images
from metagmvae.pipelines.files import first_line, reading
from metagmvae.pipelines.label_file import COLUMNS, plain_name
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sources.source import ImageSource

SUFFIX = ".parquet"
File = tuple[str, int]
"""Path and time stamp: a file that was written again is read again."""


def open_parquet(
    source: str | None = None,
    *,
    image: str | None = None,
    label: str | None = None,
    classes: bool = True,
    size: int | None = None,
    channels: int | None = None,
    invert: bool = False,
    crop: bool = True,
    fractions: Sequence[float] | None = None,
    validation_classes: int | None = None,
    test_classes: int | None = None,
    seed: int = 0,
) -> ImageSource:
    """Images of Parquet files; their content is held in memory. See `open_images`.

    The files of a folder are joined, those of several splits too, because they have the same classes: the classes are
    divided, as those of a folder.

    Args:
        source: Parquet file, or a folder with such files, also in sub-folders.
        image: column of the contents of image files: binary, or structs with a field `bytes`; None: the only one.
        label: column of the classes, words or whole numbers, whose names the metadata of Hugging Face tell; None: the
            one with a usual name (`label_file.COLUMNS`), if there is one.
        classes: False takes no classes.
        size: as all further options, see `open_images`.

    Raises:
        DataError: a file cannot be read, lacks a column or has several that can be it, or a row has no image or no
            class; or as `open_images`.
    """
    if source is None:
        raise DataError("no Parquet file given; give one, or a folder of them, with --source")
    files = _files(Path(source))
    first = files[0][0]
    schema = _schema(first)
    # Values of --option are those of JSON: a column may be named 1.
    given = {"image": image, "label": label}
    given = {meaning: None if name is None else str(name) for meaning, name in given.items()}
    columns = {meaning: _column(first, schema, meaning, name) for meaning, name in given.items()}
    image_column = columns["image"]
    assert image_column is not None
    images: Any = TableImages(files, image_column)
    labels = None
    if classes and columns["label"] is not None:
        labels = _labels(files, columns["label"], _class_names(schema, columns["label"]))
    try:
        return open_images(
            images,
            labels,
            name="parquet",
            size=size,
            channels=channels,
            invert=invert,
            crop=crop,
            fractions=fractions,
            validation_classes=validation_classes,
            test_classes=test_classes,
            seed=seed,
        )
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


@dataclass(frozen=True)
class TableImages:
    """The contents of the image files in a column, by row of all files; a worker reads the files again."""

    files: tuple[File, ...]
    column: str

    def __len__(self) -> int:
        return len(_read(self.files, self.column))

    def __getitem__(self, row: int) -> bytes:
        value = _read(self.files, self.column)[row].as_py()
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if content is None:
            raise DataError(f"row {row} has no image file in the column {printable(self.column)}; save the files in it")
        return bytes(content)


def _files(source: Path) -> tuple[File, ...]:
    found = [source]
    if source.is_dir():
        inside = (path.relative_to(source) for path in source.rglob(f"*{SUFFIX}"))
        found = sorted(source / path for path in inside if not any(part[0] == "." for part in path.parts))
    if not found:
        raise DataError(f"{source}: holds no {SUFFIX} files; give the folder that does")
    with reading(source):
        return tuple((str(path.absolute()), path.stat().st_mtime_ns) for path in found)


@contextmanager
def _reading_parquet(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: no intact Parquet file ({first_line(error)}); write it again") from error


def _schema(path: str) -> pa.Schema:
    with _reading_parquet(path):
        return pq.read_schema(path)


@lru_cache(maxsize=2)
def _read(files: tuple[File, ...], column: str) -> pa.ChunkedArray:
    """A column of all files."""
    parts = []
    for path, _ in files:
        schema = _schema(path)
        if column not in schema.names:
            raise DataError(f"{path}: has no column {printable(column)}; {files[0][0]} has")
        with _reading_parquet(path):
            parts.append(pq.read_table(path, columns=[column])[column])
    if any(part.type != parts[0].type for part in parts):
        raise DataError(
            f"{files[0][0]}: the column {printable(column)} differs in type from other files; make them equal"
        )
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)


def _column(path: str, schema: pa.Schema, meaning: str, given: str | None) -> str | None:
    """The column of the images, or of the classes; None: there are no classes.

    Raises:
        DataError: it is not there, or several can be it.
    """
    if given is not None:
        possible = [name for name in schema.names if name == given]
    elif meaning == "image":
        possible = [field.name for field in schema if _holds_files(field.type)]
    else:
        known = [name for name in schema.names if plain_name(name) in COLUMNS["label"]]
        possible = [name for name in known if plain_name(name) == "label"] or known
    if len(possible) == 1:
        return possible[0]
    if not possible and meaning == "label" and given is None:
        return None
    kinds = ", ".join(f"{printable(field.name)}: {field.type}" for field in schema)
    what = f"columns {', '.join(map(printable, possible))} can be the {meaning}" if possible else f"no column {meaning}"
    if not possible and given is not None:
        what = f"no column {printable(given)}"
    raise DataError(f"{path}: {what} (it has {kinds}); name it with --option {meaning}=COLUMN")


def _holds_files(kind: pa.DataType) -> bool:
    """Whether a column holds contents of files."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_files(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _labels(files: tuple[File, ...], column: str, names: Sequence[str] | None) -> list[Any]:
    """The class of each row.

    Raises:
        DataError: a row has none, or a number without a name.
    """
    labels = _read(files, column).to_pylist()
    for row, label in enumerate(labels):
        if label is None or (names is not None and not (isinstance(label, int) and 0 <= label < len(names))):
            wrong = "no class" if label is None else f"class {label}, which has no name in the metadata of the file"
            raise DataError(f"{files[0][0]}: row {row} has {wrong}; leave such rows out, or use --unlabelled")
    return labels if names is None else [names[label] for label in labels]


def _class_names(schema: pa.Schema, column: str) -> Sequence[str] | None:
    """Names of the numbers of a ClassLabel of Hugging Face; None: the column holds the classes themselves."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    known = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    known = known and len(set(names)) == len(names)
    return names if known and pa.types.is_integer(schema.field(column).type) else None
