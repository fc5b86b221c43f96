"""Uploads a training run to MLflow: live while it trains, or at once by `metagmvae track`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.run_folder import SETTINGS, SYSTEM, read_lines, read_settings
from metagmvae.infra.tracking.cursor import last_uri
from metagmvae.infra.tracking.live_tracker import LiveTracker
from metagmvae.infra.tracking.run_uploader import UploadReport, not_a_run_folder, upload_run
from metagmvae.infra.tracking.system_metrics import SystemSampler


class RunTracker(LiveTracker):
    """Samples the machine and uploads a run folder while a `with` block trains in it; see `LiveTracker`."""

    def __init__(
        self,
        run_dir: str | Path,
        tracking: TrackingSettings,
        *,
        interval_s: float = 10.0,
        artifact_interval_s: float = 600.0,
    ) -> None:
        """Prepare the tracker; `start` starts it.

        Args:
            run_dir: run folder; must hold `settings.json` when `start` is called.
            tracking: MLflow store and experiment.
            interval_s: seconds between uploads, and between samples of the machine.
            artifact_interval_s: seconds between uploads of changed files before the last upload.
        """
        super().__init__(Path(run_dir).absolute(), tracking, interval_s)
        self.artifact_interval_s = artifact_interval_s
        self._artifacts_due = time.monotonic() + artifact_interval_s
        self._sampler: SystemSampler | None = None
        self._samples = 0

    def upload(self, *, last: bool) -> None:
        """Append a sample of the machine to `system.jsonl`, and upload what is new."""
        if self._sampler is None:  # here, because CPU use is measured per thread
            self._sampler, self._samples = SystemSampler(), len(read_lines(self.folder / SYSTEM))
        sample = {"time": time.time(), "sample": self._samples, **self._sampler.sample()}
        with (self.folder / SYSTEM).open("a") as file:
            file.write(json.dumps(sample) + "\n")
        self._samples += 1
        artifacts = last or time.monotonic() >= self._artifacts_due
        if artifacts:
            self._artifacts_due = time.monotonic() + self.artifact_interval_s
        upload_run(self.folder, self.tracking, artifacts=artifacts)


def track(run_dir: str | Path, uri: str = "") -> UploadReport:
    """Upload a run to the store `uri`; empty: the store of `tracking_settings`.

    Raises:
        DataError: not a run folder.
        TrackingError: the store cannot be reached.
    """
    tracking = tracking_settings(run_dir)
    return upload_run(run_dir, tracking.model_copy(update={"uri": uri or tracking.uri}))


def tracking_settings(run_dir: str | Path) -> TrackingSettings:
    """Return the tracking settings of a run.

    The store is that of the settings, else MLFLOW_TRACKING_URI, else the one that the run was uploaded to last.

    Raises:
        DataError: not a run folder.
    """
    path = Path(run_dir) / SETTINGS
    if not path.is_file():
        raise not_a_run_folder(run_dir)
    return with_last_store(read_settings(Path(run_dir)).tracking, run_dir)


def with_last_store(tracking: TrackingSettings, folder: str | Path) -> TrackingSettings:
    """Where neither the settings nor MLFLOW_TRACKING_URI name a store, choose the one that was used last."""
    known = "" if os.environ.get("MLFLOW_TRACKING_URI") else last_uri(folder)
    return tracking.model_copy(update={"uri": tracking.uri or known})
