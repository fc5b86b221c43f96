"""Unlabelled training streams: functions of (seed, split, step) alone, the same for any number of ranks and workers.

A stream names the rows of a step from a counter-based generator, so it can start at any step, and rank r of W
takes its share of each step: all ranks make equally many steps, however the shards are cut. One thread reads
ahead; the seconds that the consumer waited for it are counted.

Notation: B episodes per step over all ranks, b = B / W of this rank, M points per episode.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines.records import DataError, SetBatch

AHEAD = 4
"""Steps that are read before they are asked for."""


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A Philox generator whose stream is a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Stream(ABC):
    """Batches of the steps from `start_step` on, read ahead by a thread. Use once; `close` ends the thread."""

    def __init__(
        self,
        images: Any,
        *,
        batch: int,
        seed: int,
        split: str,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        steps: int | None = None,
    ) -> None:
        if not len(images):
            raise DataError(f"split {split!r} holds no images to train on")
        if batch % world:
            raise DataError(f"a batch of {batch} does not divide among {world} ranks: change the one or the other")
        self.images = images
        self.batch = batch
        self.seed = seed
        self.split = split
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.steps = steps
        self.waiting_s = 0.0
        self._stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self._thread: threading.Thread | None = None

    @abstractmethod
    def at(self, step: int) -> Any:
        """The batch of one step on this rank."""

    def __iter__(self) -> Iterator[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
            self._thread.start()
        return self

    def __next__(self) -> Any:
        since = time.perf_counter()
        item = self._queue.get()
        self.waiting_s += time.perf_counter() - since
        if item is None:
            self._queue.put(None)
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def _read_ahead(self) -> None:
        step = self.start_step
        try:
            while not self._stop.is_set() and (self.steps is None or step < self.steps):
                if not self._put(self.at(step)):
                    return
                step += 1
            self._put(None)
        except Exception as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Queue an item; False when the stream was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        """End the thread; safe at any time, and twice."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)


class SetStream(Stream):
    """Episodes for meta-training: M rows drawn with replacement each, as the paper's protocol does.

    Episode e = step * B + i depends on (seed, split, e) only; rank r takes i = r, r + W, ... of each step.
    """

    def __init__(self, images: Any, *, batch: int, set_size: int, **position: Any) -> None:
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

    def __init__(self, images: Any, *, batch: int, **position: Any) -> None:
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
