"""Base class of the training streams: reads batches ahead in a thread."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from typing import Any

from metagmvae.pipelines.records import DataError

READ_AHEAD = 4
"""Steps that the thread reads before they are requested."""


class Stream(ABC):
    """Iterator over the batches of the steps from `start_step` on. Iterate once; `close` stops the thread."""

    def __init__(
        self,
        images: Sized,
        *,
        batch: int,
        seed: int,
        split: str,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        steps: int | None = None,
    ) -> None:
        """Check the batch size; reading starts with the iteration.

        Args:
            images: images or features of a split.
            batch: batch size over all ranks.
            seed: seed of the order.
            split: name of the split, part of the random key.
            rank, world: this rank and the number of ranks.
            start_step: first step.
            steps: end of the iteration (exclusive); None: endless.

        Raises:
            DataError: the split is empty, or the batch size is not a multiple of the number of ranks.
        """
        if not len(images):
            raise DataError(f"split {split!r} has no images; train on another split")
        if batch % world:
            raise DataError(f"batch size {batch} is not a multiple of {world} ranks; change one of them")
        self.images = images
        self.batch = batch
        self.seed = seed
        self.split = split
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.steps = steps
        self.waiting_s = 0.0
        """Seconds that the consumer has waited for batches."""
        self._stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=READ_AHEAD)
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
        start = time.perf_counter()
        item = self._queue.get()
        self.waiting_s += time.perf_counter() - start
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
        except Exception as error:  # raised again in the consumer's thread
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Put an item into the queue; False if the stream was closed in the meantime."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        """Stop the thread. Can be called at any time and more than once."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
