"""The Parquet index of a split: position and class of each sample. It is the only file with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from metagmvae.pipelines.files import atomic_file, first_line, open_file
from metagmvae.pipelines.grouped_labels import number_groups
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.shards.manifest import REMEDY

CHUNK_ROWS = 2**17
"""Rows that are in memory at once while an index is written."""
MAX_TEXT_BYTES = 2**10
"""Largest mean length of a text column; a path of most file systems has at most 4,096 bytes."""
MAX_ROW_BYTES = 4 * MAX_TEXT_BYTES
TEXT_COLUMNS = ["key", "shard", "class_name", "source_name"]
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("row", pa.int64()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("source_name", pa.string()),
    ]
)
GROUP = pa.field("group_id", pa.int32())
"""Further column of a dataset with groups: numbers, in the order of their first row; names are not stored."""


def write_index(
    path: str | Path,
    records: Sequence[ImageRecord],
    *,
    order: np.ndarray,
    shards: Sequence[tuple[str, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    source_name: str,
) -> None:
    """Write the index of one split, in stored order and in chunks of rows.

    Args:
        records: samples of the source.
        order: (n,); order[i] is the index of the record that is stored in row i.
        shards: name of each tar file, and the offset and the size of each of its samples in bytes.
        class_names: sorted class names; the class id is the position in this list.
        source_name: name of the source.

    Raises:
        DataError: shards and source have different numbers of samples.
    """
    groups = _group_ids(records, order)
    schema = SCHEMA if groups is None else SCHEMA.append(GROUP)
    class_ids = {name: class_id for class_id, name in enumerate(class_names)}
    count = sum(len(offsets) for _, offsets, _ in shards)
    if count != len(order):
        raise DataError(
            f"{path}: {count} samples in shards, {len(order)} in the source; remove the folder and write again"
        )
    offsets = np.concatenate([np.empty(0, np.int64), *(offsets for _, offsets, _ in shards)])
    sizes = np.concatenate([np.empty(0, np.int64), *(sizes for _, _, sizes in shards)])
    shard_of_row = np.repeat(np.arange(len(shards)), [len(offsets) for _, offsets, _ in shards])
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for first in range(0, max(count, 1), CHUNK_ROWS):
            rows = np.arange(first, min(first + CHUNK_ROWS, count), dtype=np.int64)
            chunk = [records[int(row)] for row in order[rows]]
            names = [record.class_name for record in chunk]
            columns = {
                "key": [record.key for record in chunk],
                "shard": [shards[shard][0] for shard in shard_of_row[rows]],
                "offset": offsets[rows],
                "size": sizes[rows],
                "row": rows,
                "class_id": np.array([class_ids[name] for name in names], dtype=np.int32),
                "class_name": names,
                "source_name": [source_name] * len(rows),
            }
            if groups is not None:
                columns[GROUP.name] = groups[rows]
            writer.write_table(pa.table(columns, schema=schema))


def _group_ids(records: Sequence[ImageRecord], order: np.ndarray) -> np.ndarray | None:
    """Number of the group of each row, int32, (n,); None: there are no groups."""
    names = [records[int(row)].group for row in order]
    return np.array(number_groups(names), dtype=np.int32) if any(names) else None


def count_groups(records: Sequence[ImageRecord]) -> int:
    """Number of groups of some samples; 0: there are none."""
    return len({record.group for record in records} - {""})


def read_index(path: str | Path, *, rows: int, classes: int, groups: int | None = None) -> pa.Table:
    """Read an index with the given numbers of rows, classes and groups; None: without groups.

    Raises:
        DataError: it is missing, cannot be read, is damaged, or has other columns, rows, classes or groups.
    """
    schema = SCHEMA if groups is None else SCHEMA.append(GROUP)
    with open_file(path) as file:
        try:
            parquet = pq.ParquetFile(file)
            _check_size(path, parquet, rows, schema)
            # As dictionaries: the texts of a small file could otherwise fill the memory.
            table = pq.ParquetFile(file, read_dictionary=TEXT_COLUMNS).read()
            table.validate(full=True)  # also that the dictionaries have all their entries
        except DataError:
            raise
        except Exception as error:  # Arrow raises many types on damaged files
            raise DataError(f"{path}: not a readable index ({first_line(error)}); {REMEDY}") from error
    for name in TEXT_COLUMNS:
        _check_texts(path, name, table[name])
    table = table.cast(schema)
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path}: index with empty cells; {REMEDY}")
    for column, count in [("class_id", classes), *([] if groups is None else [(GROUP.name, groups)])]:
        ids = pc.unique(table[column]).to_numpy()
        if not np.array_equal(np.sort(ids), np.arange(count)):
            raise DataError(
                f"{path}: {column} has {len(ids)} values, not 0 to {count - 1} as in the manifest; {REMEDY}"
            )
    return table


def _check_size(path: str | Path, parquet: pq.ParquetFile, rows: int, schema: pa.Schema) -> None:
    """Compare the stated columns and size of an index with the manifest before anything is read into memory."""
    if not parquet.schema_arrow.equals(schema):
        columns = ", ".join(parquet.schema_arrow.names)[:200]
        raise DataError(f"{path}: not an index of this program (columns {columns}); {REMEDY}")
    stated = parquet.metadata.num_rows
    if stated != rows:
        raise DataError(f"{path}: index of {stated:,} rows, but {rows:,} in the manifest; {REMEDY}")
    size = sum(parquet.metadata.row_group(group).total_byte_size for group in range(parquet.metadata.num_row_groups))
    if size > (rows + 1000) * MAX_ROW_BYTES:
        raise DataError(f"{path}: index of {size:,} bytes for {rows:,} rows; {REMEDY}")


def _check_texts(path: str | Path, name: str, column: pa.ChunkedArray) -> None:
    """Compare the length of the texts, which the file stores as dictionaries, with the number of rows."""
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    size = sum(pc.sum(length).as_py() or 0 for length in lengths)
    if size > (len(column) + 1000) * MAX_TEXT_BYTES:
        raise DataError(f"{path}: {name} has {size:,} bytes in {len(column):,} rows; {REMEDY}")
