"""Uploads a run folder to MLflow. The run folder holds all results; MLflow holds a copy.

`upload_run` sends what a store does not have yet, and records it in `tracking.json` after the store accepted it. A
crash between the two sends a batch again, which changes nothing: the run is found again by its key, parameters and
tags are equal, a file replaces itself, and a metric point has the same (key, value, time, step), which is the primary
key of MLflow's metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.runs.run_folder import CURSOR, FIGURES, RESULTS, SETTINGS, STATUS, read_record, read_settings
from metagmvae.infra.runs.status import read_status
from metagmvae.infra.tracking.convert import READERS, parameters, tags, unsent_chunks
from metagmvae.infra.tracking.cursor import Cursor, upload_lock
from metagmvae.infra.tracking.dataset_input import DatasetReference
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.store import Store, connect, experiment_id, paginate
from metagmvae.infra.tracking.tracking_errors import ignored, tracking_errors
from metagmvae.pipelines.files import read_json, sha256_file
from metagmvae.pipelines.records import DataError

T = TypeVar("T")
RUN_KEY = "metagmvae.run_key"
PARENT = "mlflow.parentRunId"
"""Tag of a child run: the ID of its parent."""
METRICS_PER_BATCH, STRINGS_PER_BATCH = 1000, 100  # MLflow's limits; strings are parameters and tags
ARTIFACT_SUFFIXES = {".pt", ".json", ".jsonl", ".parquet", ".png", ".svg", ".html", ".csv", ".toml", ".txt", ".md"}
ARTIFACT_FOLDERS = (FIGURES, RESULTS)


@dataclass
class UploadReport:
    """What one upload sent, and where."""

    uri: str
    run_id: str
    experiment: str
    status: str
    metrics: int = 0
    """Points sent, system metrics included."""
    artifacts: list[str] = field(default_factory=list)
    """Files sent, relative to the run folder."""


def upload_run(
    run_dir: str | Path, tracking: TrackingSettings, *, artifacts: bool = True, create: bool = True
) -> UploadReport:
    """Send to MLflow what it does not have of a run.

    Args:
        run_dir: run folder with `settings.json`; all other files may still be missing.
        tracking: MLflow store and experiment.
        artifacts: send files too; otherwise only settings, metrics and the status.
        create: create the store if it does not exist.

    Raises:
        DataError: not a run folder, it has a broken metric line, or there is no store.
        TrackingError: the store cannot be reached or refuses; what it has accepted is recorded.
    """
    run_dir = Path(run_dir).absolute()
    if not (run_dir / SETTINGS).is_file():
        raise not_a_run_folder(run_dir)
    read_settings(run_dir)  # raises an error if they are no settings; the stored text is uploaded
    record = read_record(run_dir)
    with upload_lock(run_dir):
        store = connect(tracking, create=create)
        run = RunUploader(run_dir, store, tracking.experiment, read_json(run_dir / SETTINGS), record)
        with tracking_errors(store.uri):
            report = run.open()
            report.metrics = sum(run.send_lines(name) for name in READERS)
            if artifacts:
                report.artifacts = run.send_files()
            run.close()
    return report


def not_a_run_folder(path: str | Path) -> DataError:
    """Return the error for a folder without settings."""
    return DataError(f"{path}: not a run folder (no {SETTINGS}); name one that `metagmvae train` wrote")


class RunUploader:
    """Sends to one store what it does not have of a folder: `open`, then the other methods, then `close`."""

    def __init__(
        self, run_dir: Path, store: Store, experiment: str, settings: Mapping[str, Any], record: Mapping[str, Any]
    ) -> None:
        """Read the status and the cursor.

        The settings become parameters of the MLflow run, and tags where they may change; the record becomes tags.
        """
        self.run_dir, self.store, self.client = run_dir, store, store.client
        self.experiment, self.settings, self.record = experiment, settings, record
        self.cursor = Cursor(run_dir, store.uri)
        self.entry = self.cursor.entry

    def open(self) -> UploadReport:
        """Find or create the MLflow run, and send parameters and tags; return a report without metrics and files.

        The key of the run is on disk before the run is created, so that it is created once.
        """
        self.status, self.started_ms, self.ended_ms = read_status(self.run_dir)
        if self.entry["run_id"] is not None:
            self._check_not_deleted(self.entry["run_id"])
        else:
            self.cursor.save()
            run = self._find_or_create()
            # The start is part of the time of each point, so it stays what it was when the run was created.
            self.entry |= {"run_id": run.info.run_id, "started_ms": run.info.start_time, "status": "RUNNING"}
            self.cursor.save()
        self._send_parameters_and_tags()
        self._send_dataset()
        return UploadReport(self.cursor.shown, self.entry["run_id"], self.experiment, self.status)

    def send_lines(self, name: str) -> int:
        """Send the new lines of a file of metric lines; return the number of points."""
        from mlflow.entities import Metric

        position, sent = self.entry["lines"].get(name, {}), 0
        chunks = unsent_chunks(self.run_dir / name, position, self.entry["started_ms"], METRICS_PER_BATCH)
        for chunk in chunks:
            points = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in chunk.points]
            for batch in _batches(points, METRICS_PER_BATCH):
                self.client.log_batch(self.entry["run_id"], metrics=batch, synchronous=True)
            self.entry["lines"][name] = chunk.position
            self.cursor.save()
            sent += len(points)
        return sent

    def send_files(self) -> list[str]:
        """Send new and changed files: checkpoint, records, results, figures; return their names."""
        return [name for name, path in self._files() if self._send_file(name, path)]

    def close(self) -> None:
        """Send the status of the run if it has changed."""
        if self.status == self.entry["status"]:
            return
        if self.status == "RUNNING":
            self.client.update_run(self.entry["run_id"], status="RUNNING")
        else:
            self.client.set_terminated(self.entry["run_id"], self.status, self.ended_ms)
        self.entry["status"] = self.status
        self.cursor.save()

    def _find_or_create(self) -> Any:
        experiment = experiment_id(self.store, self.experiment)
        same_key = f"tags.`{RUN_KEY}` = '{self.entry['key']}'"
        existing = self.client.search_runs([experiment], same_key, max_results=1)
        if existing:
            return existing[0]
        name = self.settings.get("name", "run")
        created = self.client.create_run(
            experiment,
            start_time=self.started_ms,
            tags={RUN_KEY: self.entry["key"]},
            run_name=self.run_dir.name if name == "run" else name,
        )
        # If the answer was lost or late, MLflow's HTTP client has repeated the request, and there are two runs.
        for run in paginate(self.client.search_runs, experiment_ids=[experiment], filter_string=same_key):
            if run.info.run_id != created.info.run_id:
                self.client.delete_run(run.info.run_id)
        return created

    def _check_not_deleted(self, run_id: str) -> None:
        deleted = True
        with ignored("RESOURCE_DOES_NOT_EXIST"):
            deleted = self.client.get_run(run_id).info.lifecycle_stage != "active"
        if deleted:
            raise TrackingError(
                f"MLflow at {self.cursor.shown}: run {run_id} was deleted there; restore it, or delete "
                f"{self.cursor.path} to upload the run as a new one"
            )

    def _send_parameters_and_tags(self) -> None:
        """Send parameters once (MLflow never changes them), and tags when they have changed."""
        from mlflow.entities import Param, RunTag

        run_id = self.entry["run_id"]
        current_tags = tags(self.settings, self.record)
        digest = hashlib.sha256(json.dumps(current_tags, sort_keys=True).encode()).hexdigest()
        if not self.entry.get("parameters_sent"):
            # A run that was found again keeps its own: the path of the data may be another one since then.
            sent = self.client.get_run(run_id).data.params
            params = [Param(key, value) for key, value in parameters(self.settings).items() if key not in sent]
            for batch in _batches(params, STRINGS_PER_BATCH):
                self.client.log_batch(run_id, params=batch, synchronous=True)
            self.entry["parameters_sent"] = True
            self.cursor.save()
        if self.entry.get("tags_sha256") != digest:
            for tag_batch in _batches([RunTag(*item) for item in current_tags.items()], STRINGS_PER_BATCH):
                self.client.log_batch(run_id, tags=tag_batch, synchronous=True)
            self.entry["tags_sha256"] = digest
            self.cursor.save()

    def _send_dataset(self) -> None:
        """Send the dataset of the run once, as an input of the MLflow run."""
        reference = DatasetReference.of(self.record)
        if reference is None or self.entry.get("dataset_sent") == reference.fingerprint:
            return
        self.client.log_inputs(self.entry["run_id"], [reference.training_input()])
        self.entry["dataset_sent"] = reference.fingerprint
        self.cursor.save()

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield the files to upload; the folders that Ray writes are left out."""
        for folder in [self.run_dir, *(self.run_dir / name for name in ARTIFACT_FOLDERS)]:
            for path in sorted(folder.glob("*")):
                local_only = path.name.startswith(".") or path.name in (CURSOR, STATUS)
                if path.is_file() and not path.is_symlink() and not local_only and path.suffix in ARTIFACT_SUFFIXES:
                    yield path.relative_to(self.run_dir).as_posix(), path

    def _send_file(self, name: str, path: Path) -> bool:
        """Send a file unless the store has its content; if it changes during the upload, the next one sends it."""
        stat, known = path.stat(), self.entry["artifacts"].get(name, {})
        identity = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if identity == {key: known.get(key) for key in identity}:
            return False
        digest = sha256_file(path)
        changed = digest != known.get("sha256")
        if changed:
            folder = Path(name).parent.as_posix()
            self.client.log_artifact(self.entry["run_id"], str(path), None if folder == "." else folder)
        self.entry["artifacts"][name] = {**identity, "sha256": digest}
        self.cursor.save()
        return changed


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
