"""A column of Parquet or Arrow files, read by row numbers: mapped into memory, which does not hold it.

Parquet files cannot be mapped, so their column is unpacked into a temporary Arrow file first, some rows at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from metagmvae.pipelines.arrays.file_rows import remove_unpacked, unpacking
from metagmvae.pipelines.files import first_line
from metagmvae.pipelines.records import DataError, printable

PARQUET, ARROW = ".parquet", ".arrow"
BATCH_ROWS = 64
"""Rows that are in memory at once; photographs have some MB each."""
BUFFER_BYTES = 2**20
File = tuple[str, int]
"""Path and time stamp: a file that was written again is read again."""


@dataclass(frozen=True)
class TableColumn:
    """The values of a column, by row of all files; picklable."""

    files: tuple[File, ...]
    column: str
    unpacked: str
    """Temporary Arrow file with the column of Parquet files; empty for Arrow files."""

    @classmethod
    def open(cls, files: tuple[File, ...], column: str) -> TableColumn:
        """Unpack a column of Parquet files, and map it. The temporary file is deleted with the returned object.

        Raises:
            DataError: a file cannot be read or has no such column, or its type differs from that of other files.
            WorkError: the disk with the temporary folder is full.
        """
        _check_types(files, column)
        if _is_arrow(files[0]):
            return cls(files, column, "")
        with unpacking(files[0][0]) as target:
            _unpack(files, column, target)
        opened = cls(files, column, str(target))
        weakref.finalize(opened, _remove, target)
        return opened

    def __len__(self) -> int:
        return len(_mapped(self.files, self.column, self.unpacked))

    def __getitem__(self, row: int) -> Any:
        return _mapped(self.files, self.column, self.unpacked)[row].as_py()


def read_column(files: tuple[File, ...], column: str) -> list[Any]:
    """All values of a column of small values, such as classes; errors as `TableColumn.open`."""
    _check_types(files, column)
    values = []
    for path, _ in files:
        with _reading(path):
            table = _map(path) if _is_arrow((path, 0)) else pq.read_table(path, columns=[column])
            values += table[column].to_pylist()
    return values


def read_schema(path: str) -> pa.Schema:
    """Columns of a file.

    Raises:
        DataError: it is no Parquet or Arrow file.
    """
    with _reading(path):
        return _map(path).schema if _is_arrow((path, 0)) else pq.read_schema(path)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        kind = "Arrow" if _is_arrow((path, 0)) else "Parquet"
        raise DataError(f"{path}: no intact {kind} file ({first_line(error)}); write it again") from error


def streamed_parquet(file: str | IO[bytes]) -> pq.ParquetFile:
    """A Parquet file whose `iter_batches` holds a page of each column, not all row groups that were read."""
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)


def _is_arrow(file: File) -> bool:
    return Path(file[0]).suffix.lower() == ARROW


def _check_types(files: tuple[File, ...], column: str) -> None:
    kinds = []
    for path, _ in files:
        schema = read_schema(path)
        if column not in schema.names:
            raise DataError(f"{path}: has no column {printable(column)}; {files[0][0]} has")
        kinds.append(schema.field(column).type)
    if any(kind != kinds[0] for kind in kinds):
        raise DataError(
            f"{files[0][0]}: the column {printable(column)} differs in type from other files; make them equal"
        )


def _unpack(files: tuple[File, ...], column: str, target: Path) -> None:
    schema = pa.schema([pa.field(column, read_schema(files[0][0]).field(column).type)])
    with open(target, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for path, _ in files:
            with _reading(path):
                parquet = streamed_parquet(path)
                batches = parquet.iter_batches(BATCH_ROWS, columns=[column], use_threads=False)
            while (batch := _next(path, batches)) is not None:  # errors of the target are those of `unpacking`
                writer.write_batch(pa.record_batch([batch.column(0)], schema=schema))
            parquet.close()


def _next(path: str, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    with _reading(path):
        return next(batches, None)


def _map(path: str) -> pa.Table:
    """A mapped Arrow file: a stream, as `datasets` of Hugging Face writes it, or with an index of its parts."""
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


@lru_cache(maxsize=2)
def _mapped(files: tuple[File, ...], column: str, unpacked: str) -> pa.ChunkedArray:
    """A column of all files. A worker of another machine, which has no temporary file, unpacks one of its own."""
    if not unpacked:
        return _joined([path for path, _ in files], column)
    if Path(unpacked).exists():
        return _joined([unpacked], column)
    with unpacking(files[0][0]) as target:
        _unpack(files, column, target)
    array = _joined([str(target)], column)
    remove_unpacked(target)  # mapped, it stays until the process ends
    return array


def _joined(paths: list[str], column: str) -> pa.ChunkedArray:
    parts = []
    for path in paths:
        with _reading(path):
            parts.append(_map(path)[column])
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)


def _remove(target: Path) -> None:
    _mapped.cache_clear()  # a mapped file would keep its place on the disk
    remove_unpacked(target)
