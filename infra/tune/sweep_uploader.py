"""Uploads a sweep to MLflow: one parent run, and a child run for each trial that was started.

A trial takes three requests (create the run, log all values in one batch, end the run), whatever its length. Only the
learning curve of its run folder is sent. What the store has accepted is recorded in `tracking.json` of the sweep's
folder after every few trials. After a crash in between, the same data is sent again, which changes nothing: child runs
are found by the number of their trial, and MLflow stores an equal point once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metagmvae.configs.load import settings_from_json
from metagmvae.evaluation.sweeps.record import read_plan
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial
from metagmvae.infra.runs.run_folder import SETTINGS
from metagmvae.infra.runs.run_folder import STATUS as STATUS_FILE
from metagmvae.infra.runs.status import write_status
from metagmvae.infra.tracking.convert import flatten
from metagmvae.infra.tracking.cursor import upload_lock
from metagmvae.infra.tracking.run_tracker import caller_store
from metagmvae.infra.tracking.run_uploader import PARENT, RunUploader, UploadReport
from metagmvae.infra.tracking.store import Store, connect, paginate
from metagmvae.infra.tracking.tracking_errors import tracking_errors
from metagmvae.infra.tune.sweep_folder import SweepFolder
from metagmvae.pipelines.files import read_json

NUMBER, STATUS, REASON = "metagmvae.trial", "metagmvae.status", "metagmvae.reason"
RUN_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's status of a run, by the status of its trial."""
RUNNING, INTERRUPTED = "running", "interrupted"
"""Tag of a trial that continues after a resume, and of one that has not ended although its sweep has."""
POINTS_PER_BATCH = 500
"""MLflow accepts 1,000 points, parameters and tags in all in one batch."""
TRIALS_PER_SAVE = 20
"""Trials between two writes of the cursor."""


class SweepUploader:
    """Sends what a store does not have of a sweep. Reuse the object: its first upload searches for child runs."""

    def __init__(self, folder: SweepFolder, store: Store, experiment: str) -> None:
        self.folder, self.store, self.client = folder, store, store.client
        self.plan = read_plan(folder.root, with_settings=True)
        self._set_missing_status()
        settings = self.plan["base"] | {"name": self.plan["name"]}
        self.parent = RunUploader(folder.root, store, experiment, settings, self._record())
        self.entry = self.parent.entry
        self.trials: dict[str, dict[str, Any]] = self.entry.setdefault("trials", {})
        self._children_known = False

    def send_sweep(self, ended: Iterable[Trial], running: Iterable[int], *, artifacts: bool) -> UploadReport:
        """Send new trials and new points; with `artifacts` the files of the folder and the status of the sweep, too.

        Raises:
            TrackingError: the store cannot be reached or refuses; what it has accepted is recorded.
        """
        with upload_lock(self.folder.root), tracking_errors(self.store.uri):
            self._set_missing_status()
            report = self.parent.open()
            self._find_children()
            trials = list(ended)
            report.metrics = self._send_children(trials, running) + self._send_progress(trials)
            if artifacts:
                self._delete_twins()
                self._end_interrupted()
                report.artifacts = self.parent.send_files()
                self.parent.close()
        return report

    def _set_missing_status(self) -> None:
        """A sweep without a status file was killed before it could write one."""
        if not (self.folder.root / STATUS_FILE).exists():
            write_status(self.folder.root, "KILLED")

    def _record(self) -> Mapping[str, Any]:
        """Return the plan as tags of the parent run."""
        search = {key: value for key, value in self.plan.items() if key not in ("base", "space", "code", "environment")}
        return flatten({"sweep": search, "space": {k: str(v) for k, v in self.plan["space"].items()}})

    def _send_children(self, ended: Sequence[Trial], running: Iterable[int]) -> int:
        sent = 0
        unsent = [trial for trial in ended if trial.status in RUN_STATUS and not self._is_complete(trial)]
        for count, trial in enumerate(unsent, start=1):
            sent += self._send_child(trial.number, flatten(trial.settings), trial.curve, trial)
            if count % TRIALS_PER_SAVE == 0:
                self.parent.cursor.save()
        ended_numbers = {trial.number for trial in ended}
        for number in running:
            if number not in ended_numbers:
                curve = self.folder.curve(number, self.plan["task"])
                settings = flatten(read_json(self.folder.trial_folder(number) / SETTINGS))
                sent += self._send_child(number, {name: settings[name] for name in self.plan["space"]}, curve, None)
        self.parent.cursor.save()
        return sent

    def _is_complete(self, trial: Trial) -> bool:
        return self.trials.get(str(trial.number), {}).get("ended") == [trial.status, trial.reason]

    def _send_child(
        self, number: int, values: Mapping[str, str], curve: Sequence[CurvePoint], ended: Trial | None
    ) -> int:
        """Send what is new of one trial; return the number of points."""
        from mlflow.entities import Metric, Param, RunTag

        known = self.trials.get(str(number))
        started_ms = round(1000 * (self.folder.trial_folder(number) / SETTINGS).stat().st_mtime)
        if known is None:
            tags = {PARENT: self.entry["run_id"], NUMBER: str(number)}
            name = f"{self.plan['name']}-{number:05d}"
            run = self.client.create_run(self._experiment_id(), start_time=started_ms, tags=tags, run_name=name)
            known = self.trials[str(number)] = {"run_id": run.info.run_id, "points": 0}
        key = f"validation/{self.plan['task']}"
        metrics = [
            Metric(name, value, started_ms + round(1000 * point.seconds), point.step)
            for point in curve[known["points"] :]
            for name, value in ((key, point.accuracy), (f"{key}_ci95", point.ci95), ("seconds", point.seconds))
            if value is not None
        ]
        if ended is None and "ended" in known and self.parent.status == "RUNNING":  # a resumed sweep continues it
            self.client.update_run(known["run_id"], status="RUNNING")
            self.client.set_tag(known["run_id"], STATUS, RUNNING)
            del known["ended"]
        params = [] if known["points"] else [Param(*item) for item in values.items()]
        status_tags = [RunTag(STATUS, ended.status), RunTag(REASON, ended.reason)] if ended else []
        if metrics or status_tags:
            for first in range(0, max(1, len(metrics)), POINTS_PER_BATCH):
                batch = metrics[first : first + POINTS_PER_BATCH]
                self.client.log_batch(known["run_id"], metrics=batch, params=params, tags=status_tags, synchronous=True)
            known["points"] = len(curve)
        if ended is not None:
            ended_ms = started_ms + round(1000 * ended.seconds)
            self.client.set_terminated(known["run_id"], RUN_STATUS[ended.status], ended_ms)
            known["ended"] = [ended.status, ended.reason]
        return len(metrics)

    def _send_progress(self, ended: Sequence[Trial]) -> int:
        """Send the best accuracy and the number of ended trials so far, as metrics of the parent run."""
        from mlflow.entities import Metric

        count = sum(trial.status != "refused" for trial in ended)
        best = max((trial.last.accuracy for trial in ended if trial.last), default=None)
        if best is None or count == self.entry.get("counted"):
            return 0
        now = round(1000 * time.time())
        values = {"best_accuracy": best, "trials": count, "refused": len(ended) - count}
        points = [Metric(k, v, now, count) for k, v in values.items()]
        self.client.log_batch(self.entry["run_id"], metrics=points, synchronous=True)
        self.entry["counted"] = count
        self.parent.cursor.save()
        return len(values)

    def _find_children(self) -> None:
        """Find the child runs that an earlier process created and did not record."""
        if self._children_known:
            return
        for run in self._children():
            self.trials.setdefault(run.data.tags[NUMBER], {"run_id": run.info.run_id, "points": 0})
        self._children_known = True

    def _delete_twins(self) -> None:
        """Delete second child runs of a trial: MLflow's HTTP client repeats a request whose answer was lost or late."""
        for run in list(self._children()):
            if run.info.run_id != self.trials[run.data.tags[NUMBER]]["run_id"]:
                self.client.delete_run(run.info.run_id)

    def _end_interrupted(self) -> None:
        """End the child runs of trials that were interrupted with their sweep, until a resume continues them."""
        if self.parent.status == "RUNNING":
            return
        for known in self.trials.values():
            if "ended" not in known:
                self.client.set_tag(known["run_id"], STATUS, INTERRUPTED)
                self.client.set_terminated(known["run_id"], "KILLED", self.parent.ended_ms)
                known["ended"] = [INTERRUPTED, ""]

    def _children(self) -> Iterator[Any]:
        query = f"tags.`{PARENT}` = '{self.entry['run_id']}'"
        return paginate(self.client.search_runs, experiment_ids=[self._experiment_id()], filter_string=query)

    def _experiment_id(self) -> str:
        """Return the experiment of the parent run, in which child runs are created."""
        if "experiment_id" not in self.entry:
            self.entry["experiment_id"] = self.client.get_run(self.entry["run_id"]).info.experiment_id
        experiment_id: str = self.entry["experiment_id"]
        return experiment_id


def track_sweep(root: str | Path) -> UploadReport:
    """Upload a sweep to the store of `caller_store`.

    Raises:
        TrackingError: the store cannot be reached, or another process is uploading the sweep.
    """
    folder = SweepFolder(Path(root).absolute())
    tracking = settings_from_json(json.dumps(read_plan(folder.root, with_settings=True)["base"])).tracking
    tracking = caller_store(tracking, folder.root)
    ended = folder.trials()
    running = folder.unfinished([trial.number for trial in ended])
    return SweepUploader(folder, connect(tracking), tracking.experiment).send_sweep(ended, running, artifacts=True)
