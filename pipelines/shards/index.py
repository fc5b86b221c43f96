"""The Parquet index of a split: position and class of each sample. It is the only file with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError, ImageRecord
from metagmvae.pipelines.shards.manifest import REMEDY

CHUNK_ROWS = 2**17
"""Rows that are in memory at once while an index is written."""
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


def write_index(
    path: str | Path,
    records: Sequence[ImageRecord],
    *,
    order: np.ndarray,
    shards: Sequence[tuple[str, np.ndarray]],
    sample_bytes: int,
    class_names: Sequence[str],
    source_name: str,
) -> None:
    """Write the index of one split, in stored order and in chunks of rows.

    Args:
        records: samples of the source.
        order: (n,); order[i] is the index of the record that is stored in row i.
        shards: name of each tar file, and the offset of each of its samples in bytes.
        sample_bytes: size of one sample in bytes.
        class_names: sorted class names; the class id is the position in this list.
        source_name: name of the source.

    Raises:
        DataError: shards and source have different numbers of samples.
    """
    class_ids = {name: class_id for class_id, name in enumerate(class_names)}
    count = sum(len(offsets) for _, offsets in shards)
    if count != len(order):
        raise DataError(
            f"{path}: {count} samples in shards, {len(order)} in the source; remove the folder and write again"
        )
    offsets = np.concatenate([np.empty(0, np.int64), *(offsets for _, offsets in shards)])
    shard_of_row = np.repeat(np.arange(len(shards)), [len(offsets) for _, offsets in shards])
    with atomic_file(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for first in range(0, max(count, 1), CHUNK_ROWS):
            rows = np.arange(first, min(first + CHUNK_ROWS, count), dtype=np.int64)
            chunk = [records[int(row)] for row in order[rows]]
            names = [record.class_name for record in chunk]
            columns = {
                "key": [record.key for record in chunk],
                "shard": [shards[shard][0] for shard in shard_of_row[rows]],
                "offset": offsets[rows],
                "size": np.full(len(rows), sample_bytes, dtype=np.int64),
                "row": rows,
                "class_id": np.array([class_ids[name] for name in names], dtype=np.int32),
                "class_name": names,
                "source_name": [source_name] * len(rows),
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))


def read_index(path: str | Path) -> pa.Table:
    """Read an index.

    Raises:
        DataError: it is missing, damaged, or has other columns.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: index is missing; `metagmvae verify` lists all missing files") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable index ({error}); {REMEDY}") from error
    if not table.schema.equals(SCHEMA):
        raise DataError(f"{path}: not an index of this program (columns {', '.join(table.column_names)}); {REMEDY}")
    return table
