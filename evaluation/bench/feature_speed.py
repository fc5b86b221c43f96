"""`metagmvae bench features`: speed and memory of writing and reading feature shards, on synthetic features."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.bench.memory import peak_rss
from metagmvae.pipelines.records import ImageRecord
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.indexed import SetStream
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset

SIZE = 256
BATCH, SET_SIZE, STEPS = 4, 300, 500


@dataclass(frozen=True)
class SyntheticFeatures:
    """A `RowSource` of random features, each block a function of its first row index."""

    rows: int
    dtype: str = "float16"
    name: str = "synthetic features"
    fingerprint: str = "synthetic"
    attachments: dict[str, Path] = field(default_factory=dict)
    permuted: bool = True

    @property
    def row_shape(self) -> tuple[int]:
        return (SIZE,)

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "features", "image_shape": [3, 84, 84], "feature_size": SIZE, "encoder": {"sha256": "none"}}

    @property
    def splits(self) -> dict[str, Sequence[ImageRecord]]:
        return {"train": _Records(self.rows)}

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        return keyed_rng("bench features", rows[0]).standard_normal((len(rows), SIZE), np.float32).astype(self.dtype)


class _Records(Sequence[ImageRecord]):
    """Records that are created on access, to save memory."""

    def __init__(self, count: int) -> None:
        self.rows = count

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.rows:  # iteration over a sequence ends with IndexError
            raise IndexError(number)
        return ImageRecord(f"{int(number):09d}", f"{int(number) % 1000:03d}", _no_image)


def _no_image() -> np.ndarray:
    raise NotImplementedError("synthetic features have no images")


def bench_features(rows: int) -> dict[str, Any]:
    """Measure rows per second, and the peak memory of this process with a tenth of the rows and with all rows.

    The peak after writing should not depend on the number of rows. The peak after reading includes the pages of the
    memory-mapped shards, which the operating system can reclaim.

    Args:
        rows: number of rows to write and read.
    """
    result: dict[str, Any] = {"rows": rows, "feature_size": SIZE, "dtype": "float16"}
    peaks = {}
    for name, count in (("a tenth", max(rows // 10, 1)), ("all", rows)):
        with tempfile.TemporaryDirectory() as folder:
            peaks[name] = _measure(Path(folder) / "data", count, result)
    result["peak_memory_gib"] = peaks
    return result


def _measure(folder: Path, count: int, result: dict[str, Any]) -> dict[str, float]:
    """Write and read `count` rows; put the rates into `result` and return the peak memory in GiB."""
    start = time.perf_counter()
    write_dataset(SyntheticFeatures(count), folder)
    result["written_rows_per_s"] = count / (time.perf_counter() - start)
    written = peak_rss() / 2**30
    dataset = Dataset.open(folder)
    start = time.perf_counter()
    mapped = dataset.rows("train", "mmap")
    result["opened_and_compared_rows_per_s"] = count / (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in SetStream(mapped, batch=BATCH, set_size=SET_SIZE, seed=0, split="train", steps=STEPS):
        pass
    result["sampled_in_place_rows_per_s"] = STEPS * BATCH * SET_SIZE / (time.perf_counter() - start)
    start = time.perf_counter()
    streamed = StreamedImages(dataset, "train", 16_384)
    for number, _ in enumerate(streamed.rows(0, 0, 1, 0), 1):
        if number == count:
            break
    result["streamed_rows_per_s"] = count / (time.perf_counter() - start)
    return {"written": written, "read": peak_rss() / 2**30}
