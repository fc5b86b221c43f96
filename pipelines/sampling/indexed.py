"""Unlabelled training streams that read rows by index.

The rows of a step depend on (seed, split, step) alone, so a stream can start at any step, and the union over the ranks
is the same for any number of ranks. Every rank makes the same number of steps, however the shards are divided.

Notation: B episodes per step over all W ranks, b = B / W episodes of this rank, M data points per episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metagmvae.pipelines.records import DataError, Rows, SetBatch
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.stream import Stream


class SetStream(Stream):
    """Episodes for meta-training: each has M rows drawn with replacement, as in the paper.

    Episode e = step * B + i depends on (seed, split, e) alone; rank r takes i = r, r + W, ... of each step.
    """

    images: Rows

    def __init__(self, images: Rows, *, batch: int, set_size: int, **position: Any) -> None:
        super().__init__(images, batch=batch, **position)
        self.set_size = set_size

    def at(self, step: int) -> SetBatch:
        episodes = np.arange(self.rank, self.batch, self.world, dtype=np.int64) + step * self.batch
        rows = np.concatenate([self.rows(int(episode)) for episode in episodes])
        images = self.images[rows]
        return SetBatch(images.reshape(len(episodes), self.set_size, *images.shape[1:]), episodes, step)

    def rows(self, episode: int) -> np.ndarray:
        """Row indices of one episode, int64, (M,)."""
        rng = keyed_rng("set", self.seed, self.split, episode)
        return rng.integers(0, len(self.images), size=self.set_size)


class ImageBatchStream(Stream):
    """Batches of single images for pre-training: a new seeded permutation each epoch.

    The last, incomplete batch of an epoch is dropped. Yields (images of this rank, step), and with `with_rows`
    (images, step, row indices).
    """

    images: Rows

    def __init__(self, images: Rows, *, batch: int, with_rows: bool = False, **position: Any) -> None:
        super().__init__(images, batch=batch, **position)
        self.with_rows = with_rows
        self.per_epoch = batches_per_epoch(len(images), batch)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def at(self, step: int) -> tuple[Any, ...]:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = keyed_rng("epoch", self.seed, self.split, epoch).permutation(len(self.images))
            self._epoch = epoch
        rows = self._order[position * self.batch : (position + 1) * self.batch][self.rank :: self.world]
        return (self.images[rows], step, rows) if self.with_rows else (self.images[rows], step)


def batches_per_epoch(images: int, batch: int) -> int:
    """Complete batches of an epoch of `ImageBatchStream`.

    Raises:
        DataError: a batch has more images than there are.
    """
    if batch > images:
        raise DataError(f"pretrain.batch ({batch}) exceeds the {images} images of the split; lower it")
    return images // batch
