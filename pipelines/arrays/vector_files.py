"""Reads feature vectors with their classes, splits and names from `.npy`, `.npz` and Parquet files.

`.npy` files and `.npz` files without compression are mapped into memory; the others are unpacked into a temporary file,
block by block. Nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from metagmvae.pipelines.arrays.file_rows import unpack_rows
from metagmvae.pipelines.arrays.numpy_arrays import ERRORS, NO_OBJECTS, member_rows, npy_rows, small_array
from metagmvae.pipelines.arrays.table_column import streamed_parquet
from metagmvae.pipelines.files import first_line, open_file
from metagmvae.pipelines.label_file import COLUMNS, plain_name
from metagmvae.pipelines.records import DataError, Rows, printable

SUFFIXES = (".npy", ".npz", ".parquet")
NAMES = {
    "vectors": ("vectors", "vector", "features", "feature", "embeddings", "embedding", "x", "data", "arr0"),
    "labels": (*COLUMNS["label"], "y", "targets"),
    "split": (*COLUMNS["split"], "splits"),
    "names": (*COLUMNS["file"], "filenames", "files", "key", "keys", "ids", "name", "names"),
}
"""Names of arrays and columns by what they hold; case, spaces, `-` and `_` are ignored."""
PARQUET_ROWS = 4096
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True)
class VectorFile:
    """The content of one file."""

    name: str
    rows: Rows
    """(n, F), numbers of any format."""
    labels: Sequence[Any] | np.ndarray | None = None
    split: Sequence[Any] | np.ndarray | None = None
    groups: Sequence[Any] | np.ndarray | None = None
    """What keeps vectors together, such as the patient."""
    names: Sequence[Any] | np.ndarray | None = None
    """Name of each vector."""
    unused: tuple[str, ...] = ()
    """Arrays or columns that mean nothing here."""


def read_vector_file(path: Path, groups: str | None = None) -> VectorFile:
    """Read a file of vectors.

    Args:
        path: `.npy`, `.npz` or Parquet file.
        groups: name of the array or column with the group of each vector; None: there is none.

    Raises:
        DataError: it cannot be read, holds no vectors or several arrays that can be them, no groups of this name, or
            Python objects.
    """
    readers: Mapping[str, Callable[[Path, str | None], VectorFile]] = {".npy": _npy, ".npz": _npz, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataError(f"{path}: is none of {', '.join(SUFFIXES)}; save the vectors as one of them")
    try:
        found = readers[suffix](path, groups)
    except DataError:
        raise
    except (*ERRORS, pa.ArrowException) as error:
        reason = f"no intact {suffix} file ({first_line(error)})"
        raise DataError(f"{path}: {reason}; write it again ({NO_OBJECTS})") from error
    if len(found.rows.shape) != 2:
        raise DataError(
            f"{path}: vectors have shape {tuple(found.rows.shape)}, but (number, values) is needed; reshape them, or "
            "give labels of a file of their own with --labels"
        )
    if 0 in found.rows.shape:
        raise DataError(f"{path}: holds no vectors (shape {tuple(found.rows.shape)}); write it again")
    return found


def _npy(path: Path, groups: str | None) -> VectorFile:
    if groups is not None:
        name = printable(groups)
        raise DataError(f"{path}: holds no groups; give them as the column {name} of a CSV file with --labels")
    return VectorFile(str(path), npy_rows(path))


def _npz(path: Path, groups: str | None) -> VectorFile:
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        names = _by_meaning(path, list(members), list(members), "array", groups)
        arrays = {
            meaning: small_array(archive, members[name], f"{path}: {name}")
            for meaning, name in names.items()
            if meaning != "vectors"
        }
        unused = tuple(printable(name) for name in members if name not in names.values())
        rows = member_rows(path, file, archive, members[names["vectors"]])
    return VectorFile(str(path), rows, unused=unused, **arrays)


def _by_meaning(
    path: Path, names: Sequence[str], vectors: Sequence[str], kind: str, groups: str | None
) -> dict[str, str]:
    """Name of the array or column by meaning (`NAMES`, and `groups`).

    Args:
        path: for messages.
        names: all names.
        vectors: those that can be vectors; a single one is, whatever its name.
        kind: `array` or `column`.
        groups: name of the groups; None: there are none.

    Raises:
        DataError: none or several can be the vectors, several have another meaning, or there are no groups of the name.
    """
    found = {}
    if groups is not None:
        named = [name for name in names if plain_name(name) == plain_name(groups)]
        if len(named) != 1:
            listed = ", ".join(map(printable, names[:20])) or "none"
            raise DataError(f"{path}: no {kind} {printable(groups)} for the groups; it has {listed}")
        found["groups"] = named[0]
        names = [name for name in names if name != named[0]]
        vectors = [name for name in vectors if name != named[0]]
    for meaning, known in NAMES.items():
        others = [name for name in names if name not in vectors or kind == "array"]
        possible = vectors if meaning == "vectors" else others
        matching = [name for name in possible if plain_name(name) in known]
        if meaning == "vectors" and len(vectors) == 1:
            matching = list(vectors)
        exact = [name for name in matching if plain_name(name) == meaning]
        if len(matching := exact or matching) > 1 or (meaning == "vectors" and not matching):
            what = f"several {kind}s" if matching else f"no {kind}"
            listed = ", ".join(map(printable, names[:20])) or "none"
            raise DataError(f"{path}: {what} can be the {meaning}; it has {listed}: name one of them {meaning}")
        if matching:
            found[meaning] = matching[0]
    return found


def _parquet(path: Path, groups: str | None) -> VectorFile:
    with open_file(path) as file:
        parquet = streamed_parquet(file)
        schema = parquet.schema_arrow
        vectors = [field.name for field in schema if _is_vector(_storage(field.type))]
        if not vectors:
            columns = ", ".join(f"{printable(field.name)}: {field.type}" for field in schema)[:300]
            raise DataError(f"{path}: no column holds lists of numbers, one vector a row; it has {columns}")
        names = _by_meaning(path, schema.names, vectors, "column", groups)
        others = {
            meaning: _texts(path, name, parquet.read([name])[name])
            for meaning, name in names.items()
            if meaning != "vectors"
        }
        if not parquet.metadata.num_rows:
            raise DataError(f"{path}: holds no vectors (0 rows); write it again")
        rows = unpack_rows(path, _lists(path, parquet, names["vectors"]))
    unused = tuple(printable(name) for name in schema.names if name not in names.values())
    return VectorFile(str(path), rows, unused=unused, **others)


def _storage(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    number = (pa.types.is_floating, pa.types.is_integer)
    return any(is_list(kind) for is_list in lists) and any(is_number(kind.value_type) for is_number in number)


def _texts(path: Path, name: str, column: pa.ChunkedArray) -> list[Any]:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{path}: column {printable(name)} is empty in row {row}; complete it, or leave the column out")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column {printable(name)} is {column.type}; give whole numbers or words")
    return list(column.to_pylist())


def _lists(path: Path, parquet: pq.ParquetFile, name: str) -> Iterator[np.ndarray]:
    """Blocks of a column of lists, which must all have as many values as the first one."""
    size, first = None, 0
    for batch in parquet.iter_batches(PARQUET_ROWS, columns=[name]):
        column = batch.column(0)
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        size = int(lengths[0]) if size is None else size
        if (lengths != size).any():
            row = int(np.argmax(lengths != size))
            found = "no vector" if lengths[row] < 0 else f"{lengths[row]} values"
            raise DataError(f"{path}: row {first + row} has {found}, and those before have {size}; give all the same")
        values = column.flatten()
        if values.null_count or size < 0:
            row = first + (values.is_null().to_pylist().index(True) // size if size > 0 else 0)
            raise DataError(f"{path}: row {row} has an empty value; compute this vector again, or remove it")
        yield values.to_numpy(zero_copy_only=False).reshape(len(lengths), size)
        first += len(lengths)
