"""Live tracking of a sweep: a background thread of the driver mirrors its folder into MLflow.

Trials never wait for MLflow. A store that cannot be reached is named once on stderr and tried again at every
interval; what it has not got at the end is sent by `metagmvae track SWEEP_DIR`, or by the next resume.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.sweeps.trials import Trial
from metagmvae.infra.runs.run_folder import CURSOR
from metagmvae.infra.runs.status import read_json, write_status
from metagmvae.infra.tracking.store import TrackingError, WarnOnce, connect

if TYPE_CHECKING:
    from metagmvae.infra.tune.sweep_state import SweepState
    from metagmvae.infra.tune.sweep_uploader import SweepUploader


INTERVAL_S = 5.0
PATIENCE_S = 120.0
"""Longest wait at the end for a store that answers."""
PATIENCE_DOWN_S = 5.0
"""Longest wait at the end for a store that did not answer the last time."""


class SweepTracker:
    """Mirrors a sweep while a `with` block runs it, and once more at its end, which is the sweep's."""

    def __init__(self, sweep: SweepState, tracking: TrackingSettings, *, interval_s: float = INTERVAL_S) -> None:
        self.sweep, self.tracking, self.interval_s = sweep, tracking, interval_s
        self.root = sweep.folder.root
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = self._closed = False
        self._say = WarnOnce(f"the sweep goes on. Send it later: metagmvae track {self.root}")

    def __enter__(self) -> SweepTracker:
        write_status(self.root, "RUNNING")
        if self.tracking.enabled:
            self._thread = threading.Thread(target=self._work, name="mlflow-sweep", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            self.close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def close(self, status: str = "FINISHED") -> None:
        """Note how the sweep ended and mirror a last time, for a bounded while."""
        self._closed = True
        write_status(self.root, status)
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join(PATIENCE_DOWN_S if self._failing else PATIENCE_S)
        if self._thread.is_alive():
            self._say(TrackingError("MLflow is slow: not all of the sweep is there yet"))

    def with_runs(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trials with the runs that MLflow has of them."""
        content = read_json(self.root / CURSOR) or {}
        known = content.get("stores", {}).get(content.get("uri"), {}).get("trials", {})
        runs = {int(number): entry["run_id"] for number, entry in known.items()}
        return [trial.model_copy(update={"run_id": runs.get(trial.number, trial.run_id)}) for trial in trials]

    def _work(self) -> None:
        sender: SweepUploader | None = None
        last = False
        while not last:
            try:
                # Opening the store takes seconds, and much more where it is away: here, not in the sweep's thread.
                sender = sender or self._sender()
                last = self._ending.is_set()
                ended, running = list(self.sweep.ended.values()), list(self.sweep.running)
                sender.send_sweep(ended, running, artifacts=last)
                self._failing = False
            except Exception as error:  # whatever MLflow raises must not end the mirror of a sweep that goes on
                self._failing, sender = True, None
                self._say(error)
                last = self._ending.is_set()
            if not last:
                self._ending.wait(self.interval_s)

    def _sender(self) -> SweepUploader:
        from metagmvae.infra.tune.sweep_uploader import SweepUploader

        return SweepUploader(self.sweep.folder, connect(self.tracking), self.tracking.experiment)
