"""Live tracking of a training run: a background thread mirrors the run folder into MLflow.

Training never waits for MLflow: not for the seconds that a new store takes, not for a server that is down,
slow or gone. Such a server is named once on stderr, and the run is sent later by `metagmvae track RUN_DIR`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.infra.runs.run_folder import SETTINGS, SYSTEM
from metagmvae.infra.runs.status import ENDED, write_status
from metagmvae.infra.tracking.cursor import last_uri
from metagmvae.infra.tracking.run_uploader import UploadReport, upload_run
from metagmvae.infra.tracking.store import TrackingError, WarnOnce, redact, store_uri
from metagmvae.infra.tracking.system_metrics import SystemSampler
from metagmvae.pipelines.records import DataError

PATIENCE_S = 120.0
"""Longest wait at the end for a store that answers: the last checkpoint may be large."""
PATIENCE_DOWN_S = 5.0
"""Longest wait at the end for a store that did not answer the last time."""


class Tracker:
    """Mirrors a run folder while a `with` block trains in it, and once more at its end.

    The block's end is the run's: FINISHED, KILLED by an interrupt or SystemExit, FAILED by any other
    exception. `status.json` says so in the run folder even if MLflow cannot be told. With `tracking.enabled`
    off only that file is written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tracking: TrackingSettings,
        *,
        interval_s: float = 10.0,
        artifact_interval_s: float = 600.0,
    ) -> None:
        """Prepare; nothing happens before `start`.

        Args:
            run_dir: run folder; must hold `settings.json` by the time of `start`.
            tracking: which store.
            interval_s: seconds between mirrors and between samples of the machine.
            artifact_interval_s: seconds between uploads of changed files before the last one.
        """
        self.run_dir, self.tracking = Path(run_dir).absolute(), tracking
        self.interval_s, self.artifact_interval_s = interval_s, artifact_interval_s
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = False
        self._say = WarnOnce(f"training goes on. Send the run later: metagmvae track {self.run_dir}")

    def start(self) -> Tracker:
        """Note that the run goes on, and begin to mirror in the background."""
        write_status(self.run_dir, "RUNNING")
        if self.tracking.enabled:
            self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
            self._thread.start()
        return self

    def close(self, status: str = "FINISHED") -> None:
        """Note how the run ended (FINISHED, FAILED or KILLED) and mirror a last time, for a bounded while."""
        if status not in ENDED:
            raise ValueError(f"status {status!r} is not one of {', '.join(ENDED)}")
        write_status(self.run_dir, status)
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join(PATIENCE_DOWN_S if self._failing else PATIENCE_S)
        if self._thread.is_alive():
            self._say(TrackingError(f"MLflow at {self._where()}: slow, not all of the run is there yet"))
        self._thread = None

    def __enter__(self) -> Tracker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _work(self) -> None:
        sampler, samples = SystemSampler(), _count_lines(self.run_dir / SYSTEM)
        files_due = time.monotonic() + self.artifact_interval_s
        first = True
        while True:
            last = self._ending.wait(0 if first else self.interval_s)
            files = last or time.monotonic() >= files_due
            if files:
                files_due = time.monotonic() + self.artifact_interval_s
            try:
                self._note({"time": time.time(), "sample": samples, **sampler.sample()})
                samples += 1
                upload_run(self.run_dir, self.tracking, artifacts=files)
                self._failing = False
            except Exception as error:  # whatever MLflow raises must not end the mirror of a run that goes on
                self._failing = True
                self._say(error)
            if last:
                return
            first = False

    def _where(self) -> str:
        try:
            return redact(store_uri(self.tracking))
        except DataError as error:
            return str(error)

    def _note(self, sample: dict[str, float]) -> None:
        with (self.run_dir / SYSTEM).open("a") as file:
            file.write(json.dumps(sample) + "\n")


def track(run_dir: str | Path, uri: str = "") -> UploadReport:
    """Send a run now: to `uri`, else where its settings or MLFLOW_TRACKING_URI say, else where it went before.

    Raises:
        DataError: not a run folder.
        TrackingError: the store cannot be reached.
    """
    tracking = tracking_of(run_dir)
    return upload_run(run_dir, tracking.model_copy(update={"uri": uri or tracking.uri}))


def tracking_of(run_dir: str | Path) -> TrackingSettings:
    """Where a run belongs: where its settings or MLFLOW_TRACKING_URI say, else where it went before.

    Raises:
        DataError: not a run folder.
    """
    path = Path(run_dir) / SETTINGS
    if not path.is_file():
        raise DataError(f"{run_dir}: not a run folder (no settings.json); name one that `metagmvae train` wrote")
    tracking = Settings.model_validate_json(path.read_text()).tracking
    known = "" if os.environ.get("MLFLOW_TRACKING_URI") else last_uri(run_dir)
    return tracking.model_copy(update={"uri": tracking.uri or known})


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0
