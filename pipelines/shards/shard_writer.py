"""Writes one shard: a tar file of blocks of rows, or of one encoded image per row."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.encoded import member_key
from metagmvae.pipelines.shards.image_codec import encode_member
from metagmvae.pipelines.shards.row_source import RowSource

ENCODED_ROWS = 512
"""Images that are in memory at once while they are encoded."""
OWNER = {"mtime": 0, "user": "metagmvae", "group": "metagmvae", "mode": 0o644}


def write_shard(source: RowSource, split: str, rows: np.ndarray, path: str, settings: dict[str, Any]) -> str:
    """Write source rows into one tar file; return its path. This is one task for a worker.

    Args:
        source: of the rows.
        split: of the source.
        rows: rows of the split, in the order in which they are stored.
        path: of the tar file.
        settings: `settings` of the manifest.

    Raises:
        DataError: a row cannot be loaded or encoded, or the file cannot be written.
    """
    import webdataset as wds

    samples = (_encoded_images if "store" in settings else _blocks)(source, split, rows, path, settings)
    # Closing it also after an error keeps the destructor of the tar file from printing the error again.
    with atomic_file(path) as file, closing(wds.TarWriter(file, encoder=False, **OWNER)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def _blocks(
    source: RowSource, split: str, rows: np.ndarray, path: str, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for number, values in enumerate(_loaded(source, split, rows, path, settings["block"])):
        header = f'{{"split": "{split}", "block": {number}, "rows": {len(values)}}}'
        key = f"{Path(path).stem}-{number:06d}"
        yield {"__key__": key, "json": header.encode(), "x.npy": _npy_bytes(values)}


def _encoded_images(
    source: RowSource, split: str, rows: np.ndarray, path: str, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One sample per image; as the files of a sample are written in the order of their names, the key is the row."""
    records, row = source.splits[split], 0
    for values in _loaded(source, split, rows, path, ENCODED_ROWS):
        for pixels in values:
            record = records[int(rows[row])]
            original = record.read() if record.read is not None else None
            suffix, content = encode_member(pixels, original, settings["quality"])
            yield {"__key__": member_key(Path(path).stem, row), suffix.removeprefix("."): content}
            row += 1


def _loaded(source: RowSource, split: str, rows: np.ndarray, path: str, count: int) -> Iterator[np.ndarray]:
    """The rows, at most `count` at a time."""
    for first in range(0, len(rows), count):
        values = source.load_block(split, rows[first : first + count].tolist())
        expected = (len(rows[first : first + count]), *source.row_shape)
        if values.dtype != np.dtype(source.dtype) or values.shape != expected:
            raise DataError(f"{path}: rows are {values.dtype} {values.shape}, not {source.dtype} {expected}")
        yield values


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
