"""Live tracking: a background thread uploads a folder to MLflow while the work that fills it goes on."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.status import ENDED, write_status
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.tracking_errors import WarnOnce
from metagmvae.pipelines.records import DataError

PATIENCE_S = 120.0
"""Longest wait for the last upload to a store that answers: the last checkpoint may be large."""
PATIENCE_DOWN_S = 5.0
"""Longest wait for the last upload to a store that did not answer the previous time."""


class LiveTracker(ABC):
    """Uploads a folder at intervals while a `with` block runs, and once more at its end.

    The block never waits for MLflow, except for a limited time at its end. A store that cannot be reached is reported
    once on stderr and tried again at each interval; `metagmvae track` uploads what is missing later.

    The status at the end of the block is FINISHED, KILLED after KeyboardInterrupt or SystemExit, and FAILED after any
    other exception. `status.json` in the folder records it even if MLflow cannot be reached. With `tracking.enabled`
    off, that file is all that is written.
    """

    subject = "run"
    """What the folder holds, for messages and for the name of the thread."""

    def __init__(self, folder: Path, tracking: TrackingSettings, interval_s: float) -> None:
        self.folder, self.tracking, self.interval_s = folder, tracking, interval_s
        self._ending, self._wake, self._flushed = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = self._closed = False
        self._warn = WarnOnce(f"the {self.subject} continues. Upload it later: metagmvae track {folder}")

    @abstractmethod
    def upload(self, *, last: bool) -> None:
        """Upload what is new in the folder; `last` is true for the upload after the end of the block."""

    def start(self) -> Self:
        """Record the status RUNNING and start the background thread."""
        write_status(self.folder, "RUNNING")
        if self.tracking.enabled:
            self._thread = threading.Thread(target=self._upload_repeatedly, name=f"mlflow-{self.subject}", daemon=True)
            self._thread.start()
        return self

    def flush(self) -> None:
        """Upload now, and wait for it for a limited time."""
        if self._thread is None:
            return
        self._flushed.clear()
        self._wake.set()
        if not self._flushed.wait(self._patience()):
            self._failing = True

    def close(self, status: str = "FINISHED") -> None:
        """Record the final status (FINISHED, FAILED or KILLED) and wait for the last upload, for a limited time."""
        if status not in ENDED:
            raise ValueError(f"status {status!r} is not one of {', '.join(ENDED)}")
        self._closed = True
        try:
            write_status(self.folder, status)
        finally:
            self._end_thread()

    def _end_thread(self) -> None:
        if self._thread is None:
            return
        self._ending.set()
        self._wake.set()
        self._thread.join(self._patience())
        if self._thread.is_alive():
            self._warn(TrackingError(f"MLflow is slow: not all of the {self.subject} has been uploaded yet"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        try:
            self.close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")
        except DataError:
            if kind is None:
                raise  # else the error of the work counts; a full disk is the reason of both

    def _patience(self) -> float:
        return PATIENCE_DOWN_S if self._failing else PATIENCE_S

    def _upload_repeatedly(self) -> None:
        last = False
        while not last:
            last, flushing = self._ending.is_set(), self._wake.is_set()
            if flushing:
                self._wake.clear()
            try:
                self.upload(last=last)
                self._failing = False
            except Exception as error:  # whatever MLflow raises must not end the uploads of work that continues
                self._failing = True
                self._warn(error)
            if flushing:
                self._flushed.set()
            if not last:
                self._wake.wait(self.interval_s)
