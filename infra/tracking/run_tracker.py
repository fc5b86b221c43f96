"""Uploads a training run to MLflow: live while it trains, or at once by `metagmvae track`."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.run_folder import SETTINGS, SYSTEM, read_lines, read_settings
from metagmvae.infra.runs.status import made_in
from metagmvae.infra.tracking.cursor import last_uri, recorded_uri
from metagmvae.infra.tracking.live_tracker import LiveTracker
from metagmvae.infra.tracking.mlflow_environment import wants_system_metrics
from metagmvae.infra.tracking.run_uploader import UploadReport, not_a_run_folder, upload_run
from metagmvae.infra.tracking.sqlite_store import sqlite_path
from metagmvae.infra.tracking.store import store_key, store_uri
from metagmvae.infra.tracking.system_metrics import SystemSampler

LOG = logging.getLogger(__name__)


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

        The machine is sampled and new lines are uploaded every `interval_s` seconds, changed files every
        `artifact_interval_s`.
        """
        super().__init__(Path(run_dir).absolute(), tracking, interval_s)
        self.artifact_interval_s = artifact_interval_s
        self._artifacts_due = time.monotonic() + artifact_interval_s
        self._sampler: SystemSampler | None = None
        self._samples = 0

    def upload(self, *, last: bool) -> None:
        """Append a sample of the machine to `system.jsonl`, and upload what is new."""
        if wants_system_metrics():
            self._sample()
        artifacts = last or time.monotonic() >= self._artifacts_due
        if artifacts:
            self._artifacts_due = time.monotonic() + self.artifact_interval_s
        upload_run(self.folder, self.tracking, artifacts=artifacts)

    def _sample(self) -> None:
        if self._sampler is None:  # here, because CPU use is measured per thread
            self._sampler, self._samples = SystemSampler(), len(read_lines(self.folder / SYSTEM))
        sample = {"time": time.time(), "sample": self._samples, **self._sampler.sample()}
        with (self.folder / SYSTEM).open("a") as file:
            file.write(json.dumps(sample) + "\n")
        self._samples += 1


def track(run_dir: str | Path, uri: str = "", *, create: bool = True) -> UploadReport:
    """Upload a run to the store `uri`; empty: the store of `tracking_settings`.

    Raises:
        DataError: not a run folder; or there is no such store, and `create` is False.
        TrackingError: the store cannot be reached.
    """
    tracking = tracking_settings(run_dir)
    return upload_run(run_dir, tracking.model_copy(update={"uri": uri or tracking.uri}), create=create)


def tracking_settings(run_dir: str | Path) -> TrackingSettings:
    """Return the tracking settings of a run, with the store of `caller_store`.

    Raises:
        DataError: not a run folder.
    """
    path = Path(run_dir) / SETTINGS
    if not path.is_file():
        raise not_a_run_folder(run_dir)
    return caller_store(read_settings(Path(run_dir)).tracking, Path(run_dir))


def caller_store(tracking: TrackingSettings, folder: Path) -> TrackingSettings:
    """Replace the store in the settings of a folder of a run or of a sweep by the one that a command uses.

    That is MLFLOW_TRACKING_URI; else, if the run was made in this folder, the store that it was uploaded to last or
    that its settings name; else the default store in the working folder. So a folder that comes from elsewhere decides
    neither which host is contacted nor which database is written to.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") or last_uri(folder)
    made = made_in(folder)
    if not uri and made is not None and made.is_here(folder):
        path = sqlite_path(store_uri(tracking))
        is_at_former_place = made.path != os.path.realpath(folder) and path is not None and not path.exists()
        if not is_at_former_place:
            return tracking
    used = tracking.model_copy(update={"uri": uri, "store": TrackingSettings().store})
    named = recorded_uri(folder) or tracking.uri
    if not uri and named and store_key(named) != store_key(store_uri(used)):
        LOG.warning(
            "%s was made in another place: its MLflow store is %s here, not %s; set MLFLOW_TRACKING_URI to use another",
            folder,
            store_uri(used),
            named,
        )
    return used
