"""`metagmvae bench prepare`: images per second written to shards, and peak memory, by number of workers."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from metagmvae.evaluation.bench.memory import current_rss, ray_worker_rss
from metagmvae.pipelines.records import MapTasks
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

POLL_S = 0.05


def bench_prepare(
    name: str, source: str, workers: Sequence[int], pool: Callable[[int], AbstractContextManager[MapTasks]]
) -> dict[str, Any]:
    """Write a source once for each number of workers; 0 means in this process.

    Args:
        name, source: kind and location of the source, as in `metagmvae prepare`.
        workers: numbers of workers to compare.
        pool: starts a given number of workers; the time of the start is not included.
    """
    start = time.perf_counter()
    opened = open_source(name, source)
    listing_seconds = time.perf_counter() - start
    images = sum(len(records) for records in opened.splits.values())
    rows = []
    for count in workers:
        with tempfile.TemporaryDirectory() as folder, pool(count) if count else nullcontext() as map_tasks:
            rows.append({"workers": count, **_measure(opened, Path(folder) / "data", images, map_tasks)})
    return {"source": name, "images": images, "listing_s": listing_seconds, "rows": rows}


def _measure(source: Any, folder: Path, images: int, map_tasks: MapTasks | None) -> dict[str, float]:
    with _sampled_memory() as samples:
        start = time.perf_counter()
        write_dataset(source, folder, map_tasks=map_tasks)
        seconds = time.perf_counter() - start
    return {"images_per_s": images / seconds, "peak_memory_gib": max(samples, default=0) / 2**30}


@contextmanager
def _sampled_memory() -> Iterator[list[int]]:
    """Yield samples of the resident memory, in bytes, of this process and of Ray's workers during the block."""
    samples: list[int] = []
    ending = threading.Event()

    def sample() -> None:
        while not ending.wait(POLL_S):
            samples.append(current_rss() + ray_worker_rss("write_shard"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ending.set()
        thread.join()
