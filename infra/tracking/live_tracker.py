"""Live tracking: a background thread uploads a folder to MLflow while the work that fills it goes on."""

from __future__ import annotations

import logging
import shlex
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.status import ENDED, final_status, write_status
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.tracking_errors import warn
from metagmvae.pipelines.records import DataError

LOG = logging.getLogger(__name__)
PATIENCE_S = 120.0
"""Longest wait for the last upload to a store that answers: the last checkpoint may be large."""
PATIENCE_STOPPED_S = 15.0
"""Longest wait for the last upload after Ctrl-C or SIGTERM: Kubernetes and Slurm kill a process after 30 s."""
PATIENCE_DOWN_S = 5.0
"""Longest wait for the last upload to a store that did not answer the previous time."""


class LiveTracker(ABC):
    """Uploads a folder at intervals while a `with` block runs, and once more at its end.

    The block never waits for MLflow, except for a limited time at its end. A store that cannot be reached is tried
    again at each interval. A line on stderr says when it stops answering, another one when it answers again, and a last
    one, at the end, if something has not been uploaded: `metagmvae track` does that later.

    The status at the end of the block is FINISHED, KILLED after KeyboardInterrupt or SystemExit, and FAILED after any
    other exception. `status.json` in the folder records it even if MLflow cannot be reached. With `tracking.enabled`
    off, that file is all that is written.
    """

    subject = "run"
    """What the folder holds, for messages and for the name of the thread."""

    def __init__(self, folder: Path, tracking: TrackingSettings, interval_s: float) -> None:
        self.folder, self.tracking, self.interval_s = folder, tracking, interval_s
        self._track_command = f"metagmvae track {shlex.quote(str(folder))}"
        self._ending, self._wake, self._flushed = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        """Why the latest upload failed; None if it succeeded."""
        self._flush_was_slow = self._closed = False

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
            self._flush_was_slow = True

    def close(self, status: str = "FINISHED") -> None:
        """Record the final status (FINISHED, FAILED or KILLED) and wait for the last upload, for a limited time."""
        if status not in ENDED:
            raise ValueError(f"status {status!r} is not one of {', '.join(ENDED)}")
        self._closed = True
        try:
            write_status(self.folder, status)
        finally:
            self._end_thread(min(self._patience(), PATIENCE_STOPPED_S) if status == "KILLED" else self._patience())

    def _end_thread(self, patience_s: float) -> None:
        """Let the thread upload for the last time, and say if it could not, or not within `patience_s`."""
        if self._thread is None:
            return
        self._ending.set()
        self._wake.set()
        try:
            self._thread.join(patience_s)
        finally:  # also after a second Ctrl-C
            error = self._error or (TrackingError("MLflow is slow") if self._thread.is_alive() else None)
            if error is not None:
                warn(error, f"not all of the {self.subject} has been uploaded. Upload it later: {self._track_command}")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        try:
            self.close(final_status(kind))
        except DataError:
            if kind is None:
                raise  # else the error of the work counts; a full disk is the reason of both

    def _patience(self) -> float:
        return PATIENCE_DOWN_S if self._error is not None or self._flush_was_slow else PATIENCE_S

    def _upload_repeatedly(self) -> None:
        last = False
        while not last:
            last, flushing = self._ending.is_set(), self._wake.is_set()
            if flushing:
                self._wake.clear()
            try:
                self.upload(last=last)
                if self._error is not None:
                    LOG.warning("MLflow accepts the %s again; what was missing has been uploaded", self.subject)
                self._error, self._flush_was_slow = None, False
            except Exception as error:  # whatever MLflow raises must not end the uploads of work that continues
                if self._error is None and not last:
                    warn(error, f"the {self.subject} continues. If this lasts, upload it later: {self._track_command}")
                self._error = error
            if flushing:
                self._flushed.set()
            if not last:
                self._wake.wait(self.interval_s)
