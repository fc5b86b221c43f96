"""Reads encoded shards with Ray Data's `read_webdataset`, for the comparison in `metagmvae bench loader`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray

from metagmvae.infra.cluster.connect import cluster

BLOCK_BYTES = 16 * 2**20
"""Ray Data starts no task whose block, 128 MiB by default, does not fit into the object store."""


@contextmanager
def ray_reader(cpus: int, batch: int) -> Iterator[Callable[[Sequence[Path]], int]]:
    """Start Ray; yield a function that reads shards in batches and returns the number of images."""
    with cluster("local", cpus):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = BLOCK_BYTES
        logging.getLogger("ray.data").setLevel(logging.ERROR)

        def read(shards: Sequence[Path]) -> int:
            images = 0
            for rows in ray.data.read_webdataset([str(path) for path in shards]).iter_batches(batch_size=batch):
                pictures = np.stack(list(rows["jpg"]))
                pictures.astype(np.float32).sum()
                images += len(pictures)
            return images

        yield read
