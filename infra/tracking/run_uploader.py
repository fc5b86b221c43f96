"""The run folder is the truth, MLflow is its mirror.

`upload_run` sends what a store has not got yet and notes it in `tracking.json`, each time after the store
accepted it. A crash between the two sends a batch again. That does no harm: the run is found again by its
key, parameters and tags are equal, an artifact replaces itself, and a metric point is the same (key, value,
time, step), which is the primary key of MLflow's metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.run_folder import CURSOR, FIGURES, RECORD, RESULTS, SETTINGS, STATUS
from metagmvae.infra.runs.status import read_json, read_status
from metagmvae.infra.tracking.convert import READERS, parameters, tags, unsent_chunks
from metagmvae.infra.tracking.cursor import Cursor, locked
from metagmvae.infra.tracking.store import Store, TrackingError, connect, experiment_id, redact, tracking_errors
from metagmvae.pipelines.records import DataError

T = TypeVar("T")
RUN_KEY = "metagmvae.run_key"
METRICS_PER_BATCH, TEXTS_PER_BATCH = 1000, 100  # MLflow's limits
ARTIFACTS = {".pt", ".json", ".jsonl", ".parquet", ".png", ".svg", ".html", ".csv", ".toml", ".txt", ".md"}
ARTIFACT_FOLDERS = (FIGURES, RESULTS)


@dataclass
class UploadReport:
    """What one call of `upload_run` sent, and where."""

    uri: str
    run_id: str
    experiment: str
    status: str
    metrics: int = 0
    """Points sent, system metrics included."""
    artifacts: list[str] = field(default_factory=list)
    """Files sent, relative to the run folder."""


def upload_run(run_dir: str | Path, tracking: TrackingSettings, *, artifacts: bool = True) -> UploadReport:
    """Send to MLflow what it does not have of a run.

    Args:
        run_dir: run folder with `settings.json`; all other files may still be missing.
        tracking: which store, which experiment.
        artifacts: send files too; without it only settings, metrics and the status.

    Raises:
        DataError: not a run folder, or a broken line in it.
        TrackingError: the store cannot be reached or refuses; what it accepted so far is noted.
    """
    run_dir = Path(run_dir).absolute()
    settings = read_json(run_dir / SETTINGS)
    if settings is None:
        raise DataError(f"{run_dir}: not a run folder (no settings.json); name one that `metagmvae train` wrote")
    with locked(run_dir):
        store = connect(tracking)
        sender = RunUploader(run_dir, store, tracking.experiment, settings)
        with tracking_errors(store.uri):
            return sender.send(artifacts)


class RunUploader:
    """Sends what one store does not have of a run folder."""

    def __init__(self, run_dir: Path, store: Store, experiment: str, settings: Mapping[str, Any]) -> None:
        self.run_dir, self.store, self.client = run_dir, store, store.client
        self.experiment, self.settings = experiment, settings
        self.refresh()
        self.cursor = Cursor(run_dir, redact(store.uri))
        self.entry = self.cursor.entry

    def refresh(self) -> None:
        """Read again whether the run goes on."""
        self.status, self.started_ms, self.ended_ms = read_status(self.run_dir)

    def record(self) -> Mapping[str, Any]:
        """What becomes tags of the run, besides settings."""
        return read_json(self.run_dir / RECORD) or {}

    def send(self, artifacts: bool) -> UploadReport:
        self._open()
        report = UploadReport(self.cursor.uri, self.entry["run_id"], self.experiment, self.status)
        self._texts()
        for name in READERS:
            report.metrics += self._lines(name)
        if artifacts:
            report.artifacts = [name for name, path in self._files() if self._artifact(name, path)]
        self._close()
        return report

    def _open(self) -> None:
        """Find or make the MLflow run; its key is on disk before the run is made, so it is made once."""
        if self.entry["run_id"] is not None:
            self._still_there(self.entry["run_id"])
            return
        self.cursor.save()
        experiment = experiment_id(self.store, self.experiment)
        ours = f"tags.`{RUN_KEY}` = '{self.entry['key']}'"
        found = self.client.search_runs([experiment], ours, max_results=1)
        name = self.settings.get("name", "run")
        run = (
            found[0]
            if found
            else self.client.create_run(
                experiment,
                start_time=self.started_ms,
                tags={RUN_KEY: self.entry["key"]},
                run_name=self.run_dir.name if name == "run" else name,
            )
        )
        # The start is part of every point's time: it stays what it was when the run was made.
        self.entry |= {"run_id": run.info.run_id, "started_ms": run.info.start_time, "status": "RUNNING"}
        self.cursor.save()

    def _still_there(self, run_id: str) -> None:
        from mlflow import MlflowException

        try:
            gone = self.client.get_run(run_id).info.lifecycle_stage != "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            gone = True
        if gone:
            raise TrackingError(
                f"MLflow at {self.cursor.uri}: run {run_id} was deleted there; restore it, or delete "
                f"{self.cursor.path} to send the run as a new one"
            )

    def _texts(self) -> None:
        """Parameters once (MLflow never changes them), tags when they changed."""
        from mlflow.entities import Param, RunTag

        run_id = self.entry["run_id"]
        wanted = tags(self.settings, self.record())
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        if not self.entry.get("parameters_sent"):
            params = [Param(key, value) for key, value in parameters(self.settings).items()]
            for some in _batches(params, TEXTS_PER_BATCH):
                self.client.log_batch(run_id, params=some)
            self.entry["parameters_sent"] = True
            self.cursor.save()
        if self.entry.get("tags_sha256") != digest:
            for several in _batches([RunTag(*item) for item in wanted.items()], TEXTS_PER_BATCH):
                self.client.log_batch(run_id, tags=several)
            self.entry["tags_sha256"] = digest
            self.cursor.save()

    def _lines(self, name: str) -> int:
        from mlflow.entities import Metric

        position, sent = self.entry["lines"].get(name, {}), 0
        chunks = unsent_chunks(self.run_dir / name, position, self.entry["started_ms"], METRICS_PER_BATCH)
        for chunk in chunks:
            points = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in chunk.points]
            for some in _batches(points, METRICS_PER_BATCH):
                self.client.log_batch(self.entry["run_id"], metrics=some)
            self.entry["lines"][name] = chunk.position
            self.cursor.save()
            sent += len(points)
        return sent

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Files that go along: checkpoint, records, results, figures; no folder that an engine keeps."""
        folders = [self.run_dir, *(self.run_dir / name for name in ARTIFACT_FOLDERS)]
        for folder in folders:
            for path in sorted(folder.glob("*")):
                own = path.name.startswith(".") or path.name in (CURSOR, STATUS)
                if path.is_file() and not path.is_symlink() and not own and path.suffix in ARTIFACTS:
                    yield path.relative_to(self.run_dir).as_posix(), path

    def _artifact(self, name: str, path: Path) -> bool:
        """Send a file unless the store has these bytes; one that changes meanwhile goes again next time."""
        stat, known = path.stat(), self.entry["artifacts"].get(name, {})
        identity = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if identity == {key: known.get(key) for key in identity}:
            return False
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        changed = digest != known.get("sha256")
        if changed:
            folder = Path(name).parent.as_posix()
            self.client.log_artifact(self.entry["run_id"], str(path), None if folder == "." else folder)
        self.entry["artifacts"][name] = {**identity, "sha256": digest}
        self.cursor.save()
        return changed

    def _close(self) -> None:
        if self.status == self.entry["status"]:
            return
        if self.status == "RUNNING":
            self.client.update_run(self.entry["run_id"], status="RUNNING")
        else:
            self.client.set_terminated(self.entry["run_id"], self.status, self.ended_ms)
        self.entry["status"] = self.status
        self.cursor.save()


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
