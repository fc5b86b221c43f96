"""`tracking.json` and `status.json` in a run folder: what MLflow has of the run, and how the run ended."""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metagmvae.infra.runs.run_folder import CURSOR, TRACKING_LOCK
from metagmvae.infra.runs.status import read_json
from metagmvae.infra.tracking.store import TrackingError
from metagmvae.pipelines.files import write_json


class Cursor:
    """What one store has of a run. Written after the store accepted something, never before.

    The file holds one entry for each store that the run was sent to, and `run_id` and `uri` of the last one.
    """

    def __init__(self, run_dir: Path, uri: str) -> None:
        """Read the cursor; `uri` is the store's, without password."""
        self.path = run_dir / CURSOR
        self.uri = uri
        self.content = read_json(self.path) or {"version": 1, "stores": {}}
        empty: dict[str, Any] = {"key": uuid.uuid4().hex, "run_id": None, "lines": {}, "artifacts": {}}
        self.entry = self.content["stores"].setdefault(uri, empty)

    def save(self) -> None:
        write_json(self.path, self.content | {"run_id": self.entry["run_id"], "uri": self.uri})


def last_uri(run_dir: str | Path) -> str:
    """Return the store that the run was sent to last; empty if it never was."""
    return str((read_json(Path(run_dir) / CURSOR) or {}).get("uri", ""))


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder against a second mirror.

    Raises:
        TrackingError: another process, or another thread of this one, is sending the run.
    """
    with (run_dir / TRACKING_LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrackingError(f"{run_dir}: is being sent to MLflow just now; try again later") from error
        yield
