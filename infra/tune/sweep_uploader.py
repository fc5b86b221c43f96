"""A sweep in MLflow's terms: a parent run, and a child for each trial that took a slot.

A trial costs three requests (made, all its values in one batch, ended), whatever its length, and nothing of its run
folder but its curve is sent. What the store has got is noted in `tracking.json` of the sweep's folder after every few
trials. A crash in between sends them again, which changes nothing: children are found by their number, and a point is
the same point twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metagmvae.configs.load import settings_from_json
from metagmvae.evaluation.sweeps.trials import CurvePoint, Trial
from metagmvae.infra.runs.run_folder import SETTINGS
from metagmvae.infra.runs.run_folder import STATUS as STATUS_FILE
from metagmvae.infra.runs.status import write_status
from metagmvae.infra.tracking.convert import flatten
from metagmvae.infra.tracking.cursor import last_uri, locked
from metagmvae.infra.tracking.run_uploader import RunUploader, UploadReport
from metagmvae.infra.tracking.store import Store, connect, tracking_errors
from metagmvae.infra.tune.sweep_folder import SWEEP, SweepFolder
from metagmvae.pipelines.files import read_json

PARENT, NUMBER, STATUS, REASON = "mlflow.parentRunId", "metagmvae.trial", "metagmvae.status", "metagmvae.reason"
ENDINGS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's words for how a trial ended."""
POINTS = 500
"""In a batch, which may hold 1,000 things in all."""
TOGETHER = 20
"""Trials between notes of what was sent."""


class SweepUploader(RunUploader):
    """Sends what a store does not have of a sweep. Keep it: it looks only once for children of an earlier process."""

    def __init__(self, folder: SweepFolder, store: Store, experiment: str) -> None:
        self.folder, self.plan = folder, read_json(folder.root / SWEEP)
        settings = self.plan["base"] | {"name": self.plan["name"]}
        super().__init__(folder.root, store, experiment, settings)
        self.trials: dict[str, dict[str, Any]] = self.entry.setdefault("trials", {})
        self._looked = False

    def send_sweep(self, ended: Iterable[Trial], running: Iterable[int], *, artifacts: bool) -> UploadReport:
        """Send new trials and new points; with `artifacts` the files of the folder too, and how the sweep ended.

        Raises:
            TrackingError: the store cannot be reached or refuses; what it accepted so far is noted.
        """
        with locked(self.run_dir), tracking_errors(self.store.uri):
            self.refresh()
            self._open()
            self._texts()
            self._adopt()
            report = UploadReport(self.cursor.uri, self.entry["run_id"], self.experiment, self.status)
            done = list(ended)
            report.metrics = self._children(done, running) + self._progress(done)
            if artifacts:
                report.artifacts = [name for name, path in self._files() if self._artifact(name, path)]
                self._close()
        return report

    def refresh(self) -> None:
        """Read again whether the sweep goes on; one that says nothing was killed before it could."""
        if not (self.run_dir / STATUS_FILE).exists():
            write_status(self.run_dir, "KILLED")
        super().refresh()

    def record(self) -> Mapping[str, Any]:
        """The plan, as tags of the parent."""
        free = {key: value for key, value in self.plan.items() if key not in ("base", "space", "code", "environment")}
        return flatten({"sweep": free, "space": {k: str(v) for k, v in self.plan["space"].items()}})

    def _children(self, ended: Sequence[Trial], running: Iterable[int]) -> int:
        sent = 0
        todo = [trial for trial in ended if trial.status in ENDINGS and not self._is_done(trial)]
        for count, trial in enumerate(todo, start=1):
            sent += self._child(trial.number, flatten(trial.settings), trial.curve, trial)
            if count % TOGETHER == 0:
                self.cursor.save()
        over = {trial.number for trial in ended}
        for number in running:
            if number not in over:
                curve = self.folder.curve(number, self.plan["task"])
                tree = flatten(read_json(self.folder.folder(number) / SETTINGS))
                sent += self._child(number, {name: tree[name] for name in self.plan["space"]}, curve, None)
        self.cursor.save()
        return sent

    def _is_done(self, trial: Trial) -> bool:
        return self.trials.get(str(trial.number), {}).get("ended") == [trial.status, trial.reason]

    def _child(self, number: int, values: Mapping[str, str], curve: Sequence[CurvePoint], trial: Trial | None) -> int:
        """Bring one trial up to date; return the points sent."""
        from mlflow.entities import Metric, Param, RunTag

        known = self.trials.get(str(number))
        began = round(1000 * (self.folder.folder(number) / SETTINGS).stat().st_mtime)
        if known is None:
            tags = {PARENT: self.entry["run_id"], NUMBER: str(number)}
            name = f"{self.plan['name']}-{number:05d}"
            run = self.client.create_run(self._experiment(), start_time=began, tags=tags, run_name=name)
            known = self.trials[str(number)] = {"run_id": run.info.run_id, "points": 0}
        new = curve[known["points"] :]
        key = f"validation/{self.plan['task']}"
        metrics = [
            Metric(name, value, began + round(1000 * point.seconds), point.step)
            for point in new
            for name, value in ((key, point.accuracy), (f"{key}_ci95", point.ci95), ("seconds", point.seconds))
        ]
        params = [] if known["points"] else [Param(*item) for item in values.items()]
        tags_now = [RunTag(STATUS, trial.status), RunTag(REASON, trial.reason)] if trial else []
        if metrics or tags_now:
            for first in range(0, max(1, len(metrics)), POINTS):
                some = metrics[first : first + POINTS]
                self.client.log_batch(known["run_id"], metrics=some, params=params, tags=tags_now)
            known["points"] = len(curve)
        if trial is not None:
            end = began + round(1000 * trial.seconds)
            self.client.set_terminated(known["run_id"], ENDINGS[trial.status], end)
            known["ended"] = [trial.status, trial.reason]
        return len(metrics)

    def _progress(self, ended: Sequence[Trial]) -> int:
        """The best accuracy so far over trials that ended, on the parent."""
        from mlflow.entities import Metric

        count = sum(trial.status != "refused" for trial in ended)
        best = max((trial.last.accuracy for trial in ended if trial.last), default=None)
        if best is None or count == self.entry.get("counted"):
            return 0
        now = round(1000 * time.time())
        pairs = {"best_accuracy": best, "trials": count, "refused": len(ended) - count}
        self.client.log_batch(self.entry["run_id"], metrics=[Metric(k, v, now, count) for k, v in pairs.items()])
        self.entry["counted"] = count
        self.cursor.save()
        return len(pairs)

    def _adopt(self) -> None:
        """Children that an earlier process made and did not come to note."""
        if self._looked:
            return
        ours, page = f"tags.`{PARENT}` = '{self.entry['run_id']}'", None
        while True:
            found = self.client.search_runs([self._experiment()], ours, max_results=1000, page_token=page)
            for run in found:
                self.trials.setdefault(run.data.tags[NUMBER], {"run_id": run.info.run_id, "points": 0})
            page = found.token
            if not page:
                break
        self._looked = True

    def _experiment(self) -> str:
        """Of the parent: children are made where it is."""
        if "experiment_id" not in self.entry:
            self.entry["experiment_id"] = self.client.get_run(self.entry["run_id"]).info.experiment_id
        return self.entry["experiment_id"]


def track_sweep(root: str | Path) -> UploadReport:
    """Send a sweep now: where its settings or MLFLOW_TRACKING_URI say, else where it went before.

    Raises:
        TrackingError: the store cannot be reached, or the sweep is being sent just now.
    """
    folder = SweepFolder(Path(root).absolute())
    tracking = settings_from_json(json.dumps(read_json(folder.root / SWEEP)["base"])).tracking
    known = "" if os.environ.get("MLFLOW_TRACKING_URI") else last_uri(folder.root)
    tracking = tracking.model_copy(update={"uri": tracking.uri or known})
    ended = folder.trials()
    running = folder.unfinished([trial.number for trial in ended])
    return SweepUploader(folder, connect(tracking), tracking.experiment).send_sweep(ended, running, artifacts=True)
