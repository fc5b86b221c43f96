"""The index of a split: where each sample lies, and its class. Labels stand here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError, ImageRecord

PIECE = 2**17
"""Rows of the index that are in memory at once while it is written."""
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
    """Write the Parquet index of one split, samples in stored order, a piece at a time.

    Args:
        records: samples of the source.
        order: which of them is stored where, (n,).
        shards: name of each tar, and the position in it of the first byte of each of its samples.
        sample_bytes: size of one sample.
        class_names: sorted; a class id is a position in it.
        source_name: name of the source.
    """
    ids = {name: number for number, name in enumerate(class_names)}
    count = sum(len(offsets) for _, offsets in shards)
    if count != len(order):
        raise DataError(f"{path}: the shards hold {count} samples and the source {len(order)}")
    offsets = np.concatenate([np.empty(0, np.int64), *(offsets for _, offsets in shards)])
    owner = np.repeat(np.arange(len(shards)), [len(offsets) for _, offsets in shards])
    with atomic_file(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for first in range(0, max(count, 1), PIECE):
            rows = np.arange(first, min(first + PIECE, count), dtype=np.int64)
            piece = [records[int(row)] for row in order[rows]]
            names = [record.class_name for record in piece]
            columns = {
                "key": [record.key for record in piece],
                "shard": [shards[number][0] for number in owner[rows]],
                "offset": offsets[rows],
                "size": np.full(len(rows), sample_bytes, dtype=np.int64),
                "row": rows,
                "class_id": np.array([ids[name] for name in names], dtype=np.int32),
                "class_name": names,
                "source_name": [source_name] * len(rows),
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))


def read_index(path: str | Path) -> pa.Table:
    """Read an index.

    Raises:
        DataError: it is missing, truncated, or has other columns.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such index; `metagmvae verify` says what else is missing") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable index ({error}); write the data set again") from error
    if not table.schema.equals(SCHEMA):
        raise DataError(f"{path}: not an index of ours, its columns are {', '.join(table.column_names)}")
    return table
