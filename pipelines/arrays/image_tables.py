"""Images in Parquet and Arrow files, as Hugging Face writes them: a column of image files, and a column of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from metagmvae.pipelines.archives.entries import LeftOut
from metagmvae.pipelines.arrays.image_arrays import Columns, ImageTable, images_opener
from metagmvae.pipelines.arrays.table_column import ARROW, PARQUET, File, TableColumn, read_column, read_schema
from metagmvae.pipelines.files import reading
from metagmvae.pipelines.label_file import COLUMNS, plain_name
from metagmvae.pipelines.records import DataError, printable
from metagmvae.pipelines.sources.image_files import files_report

CACHE = "cache-"
"""Beginning of the names of Arrow files into which `datasets` writes the results of `map` beside a dataset."""
EMBED = "save the files in it, as Dataset.save_to_disk of Hugging Face does"


def read_tables(source: str, columns: Columns) -> ImageTable:
    """Images of Parquet files, or of Arrow files that `Dataset.save_to_disk` of Hugging Face wrote.

    The files of a folder are joined, those of several splits too, because they have the same classes: the classes are
    divided, as those of a folder. Images are binary values, or structs with a field `bytes`. Classes are words or whole
    numbers, whose names the metadata of Hugging Face tell.

    Raises:
        DataError: a file cannot be read, lacks a column or has several that can be it, or a row has no image or no
            class.
    """
    files, left_out = _files(Path(source))
    first = files[0][0]
    schema = read_schema(first)
    image = _column(first, schema, "image", columns.image)
    assert image is not None
    if not _holds_files(kind := schema.field(image).type):
        raise DataError(f"{first}: the column {printable(image)} is {kind}; give one of contents of image files")
    label = _column(first, schema, "label", columns.label) if columns.classes else None
    groups = None if columns.groups is None else _column(first, schema, "groups", columns.groups)
    images: Any = TableImages(TableColumn.open(files, image))
    return ImageTable(
        images,
        None if label is None else _labels(files, label, _class_names(schema, label)),
        None if groups is None else read_column(files, groups),
        files_report([path for path, _ in files], left_out),
    )


@dataclass(frozen=True)
class TableImages:
    """The contents of the image files in a column, by row of all files."""

    values: TableColumn

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> bytes:
        value = self.values[row]
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if content is None:
            path = isinstance(value, Mapping) and value.get("path")
            instead = f", only the path {printable(str(path))}" if path else ""
            column = printable(self.values.column)
            raise DataError(f"row {row} has no image file in the column {column}{instead}; {EMBED}")
        return bytes(content)


def _files(source: Path) -> tuple[tuple[File, ...], list[LeftOut]]:
    """The files to read, and those of a folder that are left out."""
    found, left_out = [source], []
    if source.is_dir():
        inside = sorted(path for path in source.rglob("*") if path.is_file())
        hidden = [path for path in inside if any(part[0] == "." for part in path.relative_to(source).parts)]
        shown = [path for path in inside if path not in hidden]
        of_kind = {kind: [path for path in shown if path.suffix.lower() == kind] for kind in (PARQUET, ARROW)}
        cached = [path for path in of_kind[ARROW] if path.name.startswith(CACHE)]
        of_kind[ARROW] = [path for path in of_kind[ARROW] if path not in cached]
        if all(of_kind.values()):
            raise DataError(f"{source}: holds {PARQUET} and {ARROW} files; give the folder of one kind")
        found = of_kind[PARQUET] or of_kind[ARROW]
        reasons = dict.fromkeys(shown, "is no table") | dict.fromkeys(cached, "holds results of `datasets`")
        left_out = [LeftOut(str(path.relative_to(source)), reasons[path]) for path in shown if path not in found]
    if not found:
        raise DataError(f"{source}: holds no {PARQUET} or {ARROW} files; give the folder that does")
    with reading(source):
        return tuple((str(path.absolute()), path.stat().st_mtime_ns) for path in found), left_out


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
    option = "--groups COLUMN" if meaning == "groups" else f"--option {meaning}=COLUMN"
    kinds = ", ".join(f"{printable(field.name)}: {field.type}" for field in schema)
    what = f"columns {', '.join(map(printable, possible))} can be the {meaning}" if possible else f"no column {meaning}"
    if not possible and given is not None:
        what = f"no column {printable(given)}"
    raise DataError(f"{path}: {what} (it has {kinds}); name it with {option}")


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
    labels = read_column(files, column)
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


open_parquet = images_opener("parquet", "Parquet file or folder of them", read_tables)
