"""Streaming reader for data that fit neither into memory nor on the local disk.

It reads the shards in a seeded order through a shuffle buffer. Unlike the other readers it is approximate: the M images
of an episode lie close together in this order, no image occurs twice in an epoch (the paper draws from all images with
replacement), and rank r of W reads every W-th shard of an epoch, so the images of a rank depend on W.

The rows depend on (seed, split, rank, W, position) alone. Every rank makes the same number of steps: a rank that has
read all its shards starts its next epoch. Labels are not read. To start at a later step, the rows before it are read
and skipped; complete epochs are skipped without reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from metagmvae.pipelines.records import DataError, SetBatch
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.stream import Stream
from metagmvae.pipelines.shards.dataset import Dataset


@dataclass(frozen=True)
class StreamedImages:
    """A split that is read sequentially from its location. It has a length and a shape, but no access by row index."""

    dataset: Dataset
    split: str
    buffer: int
    """Rows in the shuffle buffer."""

    def __post_init__(self) -> None:
        self.dataset.split(self.split)  # raises DataError if the split does not exist

    def __len__(self) -> int:
        return int(self.dataset.split(self.split)["samples"])

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, C, H, W)."""
        return (len(self), *self.dataset.row_shape)

    def shards(self, world: int) -> list[dict[str, Any]]:
        """Entries of the shards with images, at least one for each rank.

        Raises:
            DataError: there are fewer.
        """
        shards = [shard for shard in self.dataset.split(self.split)["shards"] if shard["rows"]]
        if len(shards) < world:
            raise DataError(
                f"{self.dataset.uri}: split {self.split!r} has {len(shards)} shards for {world} workers; lower "
                "run.workers, use data.reader = mmap, or write more shards with prepare --rows-per-shard"
            )
        return shards

    def rows(self, seed: int, rank: int, world: int, skip: int) -> Iterator[np.ndarray]:
        """Endless iterator over the images of a rank, epoch after epoch: uint8, (C, H, W) each.

        Args:
            seed: seed of the order.
            rank, world: this rank and the number of ranks.
            skip: number of images to skip at the start.

        Raises:
            DataError: there are fewer shards than ranks, or a shard is damaged.
        """
        shards = self.shards(world)
        epoch = 0
        while True:
            rng = keyed_rng("shard order", seed, self.split, epoch)
            own_shards = [shards[index] for index in rng.permutation(len(shards))[rank::world]]
            count = sum(shard["rows"] for shard in own_shards)
            if skip >= count:
                skip -= count
            else:
                rows = self._shuffled(own_shards, keyed_rng("shuffle buffer", seed, self.split, epoch, rank, world))
                for index, row in enumerate(rows):
                    if index >= skip:
                        yield row
                skip = 0
            epoch += 1

    def _shuffled(self, shards: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Every row of the shards once: each new row replaces a random row of the full buffer, which is returned."""
        buffer: list[np.ndarray] = []
        for shard in shards:
            for block in self._arrays(shard):
                for row in block:
                    if len(buffer) < self.buffer:
                        buffer.append(row.copy())  # a view would keep its whole array in memory
                        continue
                    index = int(rng.integers(self.buffer))
                    yield buffer[index]
                    buffer[index] = row.copy()
        for index in rng.permutation(len(buffer)):
            yield buffer[index]

    def _arrays(self, shard: dict[str, Any]) -> Iterator[np.ndarray]:
        name = f"{self.split}/{shard['name']}"
        with self.dataset.open_shard(self.split, shard) as file:
            yield from self.dataset.stream_rows(file, f"{self.dataset.uri}: {name}", shard)


class _RowStream(Stream):
    """Takes a fixed number of rows per step from the row iterator of this rank."""

    images: StreamedImages

    def __init__(self, images: StreamedImages, *, batch: int, rows_per_item: int = 1, **position: Any) -> None:
        super().__init__(images, batch=batch, **position)
        self._rows_per_step = batch // self.world * rows_per_item
        self._next_step = self.start_step
        self._rows = images.rows(self.seed, self.rank, self.world, self.start_step * self._rows_per_step)

    def _take(self, step: int) -> np.ndarray:
        if step != self._next_step:
            raise ValueError(f"streamed rows are read in order: the next step is {self._next_step}, not {step}")
        self._next_step += 1
        return np.stack([next(self._rows) for _ in range(self._rows_per_step)])


class StreamedSets(_RowStream):
    """Counterpart of `SetStream`: unlabelled sets (b, M, C, H, W) of this rank."""

    def __init__(self, images: StreamedImages, *, batch: int, set_size: int, **position: Any) -> None:
        super().__init__(images, batch=batch, rows_per_item=set_size, **position)
        self.set_size = set_size

    def at(self, step: int) -> SetBatch:
        episodes = np.arange(self.rank, self.batch, self.world, dtype=np.int64) + step * self.batch
        rows = self._take(step)
        return SetBatch(rows.reshape(len(episodes), self.set_size, *rows.shape[1:]), episodes, step)


class StreamedImageBatches(_RowStream):
    """Counterpart of `ImageBatchStream`: (images of this rank, step)."""

    def at(self, step: int) -> tuple[np.ndarray, int]:
        return self._take(step), step
