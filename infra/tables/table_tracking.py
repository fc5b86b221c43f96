"""One MLflow run for a table; the runs of its rows become its children."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.paper_tables.table_structure import TableName
from metagmvae.infra.runs.status import final_status
from metagmvae.infra.tracking.cursor import last_entry
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.run_uploader import PARENT, RUN_KEY
from metagmvae.infra.tracking.store import Store, connect, experiment_id
from metagmvae.infra.tracking.tracking_errors import tracking_errors, warn
from metagmvae.pipelines.records import DataError


class TableTracker:
    """Opens the parent run of a table for the time of a `with` block; the same folder has the same parent.

    A store that cannot be reached is reported once, and the rows go on: their results are in files. With
    `tracking.enabled` off nothing is done.

    `out` is the folder of the runs.
    """

    def __init__(self, tracking: TrackingSettings, table: TableName, out: Path) -> None:
        self.tracking, self.table = tracking, table
        self.key = hashlib.sha256(f"table {table} in {out.absolute()}".encode()).hexdigest()[:32]
        self.failed = False
        self._store: Store | None = None
        self._run_id = ""
        self._warned = False

    def __enter__(self) -> Self:
        if self.tracking.enabled:
            self._try(self._open)
        return self

    def add(self, run_dir: Path) -> None:
        """Make the MLflow run of a run folder a child, if it has one."""
        child = last_entry(run_dir).get("run_id") if self._run_id else None
        if child:
            self._try(lambda client: client.set_tag(child, PARENT, self._run_id))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._run_id:
            return
        status = "FAILED" if kind is None and self.failed else final_status(kind)
        self._try(lambda client: client.set_terminated(self._run_id, status))

    def _open(self, _: Any) -> None:
        """Find the parent run by its key, or create it."""
        store = connect(self.tracking)
        with tracking_errors(store.uri):
            experiment = experiment_id(store, self.tracking.experiment)
            found = store.client.search_runs([experiment], f"tags.`{RUN_KEY}` = '{self.key}'", max_results=1)
            tags = {RUN_KEY: self.key, "metagmvae.table": str(self.table)}
            run = found[0] if found else store.client.create_run(experiment, tags=tags, run_name=f"table {self.table}")
            store.client.update_run(run.info.run_id, status="RUNNING")
        self._store, self._run_id = store, run.info.run_id

    def _try(self, action: Any) -> None:
        try:
            if self._store is None:
                action(None)
                return
            with tracking_errors(self._store.uri):
                action(self._store.client)
        except (TrackingError, DataError) as error:
            if not self._warned:
                warn(error, "the table goes on, and its runs have no parent run")
            self._warned = True
