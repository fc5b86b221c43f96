"""The index of a split: where each sample lies, and its class. Labels stand here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.files import atomic_file
from pipelines.records import DataError, ImageRecord

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
    shards: Sequence[str],
    offsets: np.ndarray,
    sample_bytes: int,
    class_names: Sequence[str],
    source_name: str,
) -> None:
    """Write the Parquet index of one split, samples in stored order.

    Args:
        records: samples in stored order.
        shards, offsets: tar that holds each sample, and the position of its first byte in it.
        sample_bytes: size of one sample.
        class_names: sorted; a class id is a position in it.
        source_name: name of the source.
    """
    ids = {name: number for number, name in enumerate(class_names)}
    count = len(records)
    if not len(shards) == len(offsets) == count:
        raise DataError(f"{path}: the shards hold {len(offsets)} samples and the source {count}")
    table = pa.table(
        {
            "key": [record.key for record in records],
            "shard": list(shards),
            "offset": offsets,
            "size": np.full(count, sample_bytes, dtype=np.int64),
            "row": np.arange(count, dtype=np.int64),
            "class_id": np.array([ids[record.class_name] for record in records], dtype=np.int32),
            "class_name": [record.class_name for record in records],
            "source_name": [source_name] * count,
        },
        schema=SCHEMA,
    )
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")


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
