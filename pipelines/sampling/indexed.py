"""Unlabelled training streams: functions of (seed, split, step) alone, the same for any number of ranks and workers.

A stream names the rows of a step from a counter-based generator, so it can start at any step, and rank r of W
takes its share of each step: all ranks make equally many steps, however the shards are cut. One thread reads
ahead; the seconds that the consumer waited for it are counted.

Notation: B episodes per step over all ranks, b = B / W of this rank, M points per episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metagmvae.pipelines.records import DataError, Rows, SetBatch
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.stream import Stream


class SetStream(Stream):
    """Episodes for meta-training: M rows drawn with replacement each, as the paper's protocol does.

    Episode e = step * B + i depends on (seed, split, e) only; rank r takes i = r, r + W, ... of each step.
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
        """Rows of one episode, (M,) int64."""
        rng = keyed_rng("set", self.seed, self.split, episode)
        return rng.integers(0, len(self.images), size=self.set_size)


class ImageBatchStream(Stream):
    """Single images for contrastive training: a fresh seeded permutation each epoch, none twice within one.

    The last, incomplete batch of an epoch is left out. Yields (images of this rank, step).
    """

    images: Rows

    def __init__(self, images: Rows, *, batch: int, **position: Any) -> None:
        super().__init__(images, batch=batch, **position)
        self.per_epoch = len(images) // batch
        if not self.per_epoch:
            raise DataError(f"{len(images)} images do not make one batch of {batch}: lower pretrain.batch")
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def at(self, step: int) -> tuple[np.ndarray, int]:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = keyed_rng("epoch", self.seed, self.split, epoch).permutation(len(self.images))
            self._epoch = epoch
        rows = self._order[position * self.batch : (position + 1) * self.batch]
        return self.images[rows[self.rank :: self.world]], step
