"""The interface of a training stream."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from typing import Any

from metagmvae.pipelines.records import DataError

AHEAD = 4
"""Steps that are read before they are asked for."""


class Stream(ABC):
    """Batches of the steps from `start_step` on, read ahead by a thread. Use once; `close` ends the thread."""

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
