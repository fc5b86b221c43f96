"""The reader for what fits neither memory nor disk: shards in seeded order through a shuffle buffer.

Approximate where the other readers are exact. An episode's M images stand near each other in this order and none comes
twice in an epoch (the paper draws from all images, with replacement); rank r of W reads every W-th shard of an
epoch, so what a rank sees depends on W. All else holds: the rows are a function of (seed, split, rank, W, position)
alone, every rank makes equally many steps however uneven its shards are, since it begins its next epoch when it
runs out, and no label is read. To start at a later step the rows before it are read and left out; whole
epochs are left out without reading.
"""

from __future__ import annotations

import io
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
    """A split that is read as a stream from where it lies: it has a length and a shape, and no rows by number."""

    dataset: Dataset
    split: str
    buffer: int
    """Rows that are shuffled among each other, at least one block."""

    def __post_init__(self) -> None:
        self.dataset.split(self.split)  # which raises where there is none

    def __len__(self) -> int:
        return int(self.dataset.split(self.split)["samples"])

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.dataset.row_shape)

    def rows(self, seed: int, rank: int, world: int, skip: int) -> Iterator[np.ndarray]:
        """Images of this rank for ever, epoch after epoch, from number `skip` on: uint8 (C, H, W) each.

        Raises:
            DataError: there are fewer shards than ranks, or a shard is damaged (its name is said).
        """
        shards = self.dataset.split(self.split)["shards"]
        if len(shards) < world:
            raise DataError(
                f"{self.dataset.uri}: split {self.split!r} has {len(shards)} shards for {world} workers; lower "
                "run.workers, or read it with data.reader = mmap"
            )
        epoch = 0
        while True:
            rng = keyed_rng("shard order", seed, self.split, epoch)
            mine = [shards[number] for number in rng.permutation(len(shards))[rank::world]]
            count = sum(shard["rows"] for shard in mine)
            if skip >= count:
                skip -= count
            else:
                rows = self._shuffled(mine, keyed_rng("shuffle buffer", seed, self.split, epoch, rank, world))
                for number, row in enumerate(rows):
                    if number >= skip:
                        yield row
                skip = 0
            epoch += 1

    def _shuffled(self, shards: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Every row of the shards once: a full buffer gives a random row away for each new one."""
        held: list[np.ndarray] = []
        for shard in shards:
            for block in self._blocks(shard):
                for row in block:
                    if len(held) < self.buffer:
                        held.append(row.copy())  # a view would keep its whole block in memory
                        continue
                    place = int(rng.integers(self.buffer))
                    yield held[place]
                    held[place] = row.copy()
        for place in rng.permutation(len(held)):
            yield held[place]

    def _blocks(self, shard: dict[str, Any]) -> Iterator[np.ndarray]:
        from webdataset.tariterators import tar_file_iterator

        name, count = f"{self.split}/{shard['name']}", 0
        try:
            with self.dataset.open_file(name) as file:
                for sample in tar_file_iterator(file):
                    if sample.get("fname", "").endswith(".x.npy"):
                        block = np.load(io.BytesIO(sample["data"]), allow_pickle=False)
                        count += len(block)
                        yield block
        except DataError:
            raise
        except Exception as error:  # webdataset passes on whatever tarfile and NumPy raise
            raise DataError(f"{self.dataset.uri}: {name} is damaged ({error}); write the data set again") from error
        if count != shard["rows"]:
            raise DataError(f"{self.dataset.uri}: {name} holds {count} of {shard['rows']} rows; write it again")


class _RowStream(Stream):
    """Takes so many rows a step from this rank's stream of rows."""

    images: StreamedImages
    per_step: int

    def _begin(self, per_step: int) -> None:
        self.per_step = per_step
        self._next_step = self.start_step
        self._rows = self.images.rows(self.seed, self.rank, self.world, self.start_step * per_step)

    def _take(self, step: int) -> np.ndarray:
        if step != self._next_step:
            raise ValueError(f"a stream of rows goes forward only: step {self._next_step} is next, not {step}")
        self._next_step += 1
        return np.stack([next(self._rows) for _ in range(self.per_step)])


class StreamedSets(_RowStream):
    """Like `SetStream`: unlabelled sets (b, M, C, H, W) of this rank's episodes."""

    def __init__(self, images: StreamedImages, *, batch: int, set_size: int, **position: Any) -> None:
        super().__init__(images, batch=batch, **position)
        self.set_size = set_size
        self._begin(batch // self.world * set_size)

    def at(self, step: int) -> SetBatch:
        episodes = np.arange(self.rank, self.batch, self.world, dtype=np.int64) + step * self.batch
        rows = self._take(step)
        return SetBatch(rows.reshape(len(episodes), self.set_size, *rows.shape[1:]), episodes, step)


class StreamedImageBatches(_RowStream):
    """Like `ImageBatchStream`: (images of this rank, step)."""

    def __init__(self, images: StreamedImages, *, batch: int, **position: Any) -> None:
        super().__init__(images, batch=batch, **position)
        self._begin(batch // self.world)

    def at(self, step: int) -> tuple[np.ndarray, int]:
        return self._take(step), step
