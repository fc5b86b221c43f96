"""Live tracking of a sweep: a background thread of the driver uploads the sweep's folder to MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.sweeps.trials import Trial
from metagmvae.infra.tracking.cursor import last_entry
from metagmvae.infra.tracking.live_tracker import LiveTracker
from metagmvae.infra.tracking.store import connect

if TYPE_CHECKING:
    from metagmvae.infra.tune.sweep_state import SweepState
    from metagmvae.infra.tune.sweep_uploader import SweepUploader


class SweepTracker(LiveTracker):
    """Uploads a sweep while a `with` block runs it; trials never wait for MLflow. See `LiveTracker`.

    A resumed sweep uploads what is missing, too.
    """

    subject = "sweep"

    def __init__(self, sweep: SweepState, tracking: TrackingSettings, *, interval_s: float = 5.0) -> None:
        super().__init__(sweep.folder.root, tracking, interval_s)
        self.sweep = sweep
        self._uploader: SweepUploader | None = None

    def upload(self, *, last: bool) -> None:
        """Send new trials and new points; at the end the files of the sweep and its status, too."""
        # Connecting takes seconds, and longer if the store is away, so it happens in the background thread.
        uploader, self._uploader = self._uploader or self._connect(), None
        uploader.send_sweep(list(self.sweep.ended.values()), list(self.sweep.running), artifacts=last)
        self._uploader = uploader  # kept after a success only: after an error the next upload connects again

    def with_runs(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the trials with the IDs of their MLflow runs."""
        entries = last_entry(self.folder).get("trials", {})
        run_ids = {int(number): entry["run_id"] for number, entry in entries.items()}
        return [trial.model_copy(update={"run_id": run_ids.get(trial.number, trial.run_id)}) for trial in trials]

    def _connect(self) -> SweepUploader:
        from metagmvae.infra.tune.sweep_uploader import SweepUploader

        return SweepUploader(self.sweep.folder, connect(self.tracking), self.tracking.experiment)
