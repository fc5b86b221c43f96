"""`tracking.json` and `status.json` in a run folder: what MLflow has of the run, and how the run ended."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.mlflow_store import TrackingError
from infra.tracking_lines import finished
from pipelines.files import write_json
from pipelines.records import DataError

CURSOR, STATUS, LOCK = "tracking.json", "status.json", ".tracking.lock"
ENDED = ("FINISHED", "FAILED", "KILLED")


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


def write_status(run_dir: Path, status: str) -> None:
    """Remember in the run folder whether the run goes on or how it ended, whatever MLflow can be told."""
    before = read_json(run_dir / STATUS) or {}
    now = round(1000 * time.time())
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    times = {"started_ms": before.get("started_ms", now), "ended_ms": now if status in ENDED else None}
    write_json(run_dir / STATUS, {"status": status, **times, "owner": owner})


def read_status(run_dir: Path) -> tuple[str, int, int | None]:
    """Return (status, start, end), times in ms since 1970; end is None while the run goes on.

    A run that says RUNNING while its process on this machine is gone was killed. A run that was never tracked
    has no status file: its start is the age of its settings, its end that of its last metric line.
    """
    saved = read_json(run_dir / STATUS)
    metrics = run_dir / "metrics.jsonl"
    changed = round(1000 * metrics.stat().st_mtime) if metrics.exists() else None
    if saved is None:
        started = round(1000 * (run_dir / "settings.json").stat().st_mtime)
        return ("FINISHED" if finished(metrics) else "KILLED"), started, changed
    if saved["status"] == "RUNNING" and _gone(saved["owner"]):
        return "KILLED", saved["started_ms"], changed
    return saved["status"], saved["started_ms"], saved["ended_ms"]


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder against a second mirror.

    Raises:
        TrackingError: another process, or another thread of this one, is sending the run.
    """
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrackingError(f"{run_dir}: is being sent to MLflow just now; try again later") from error
        yield


def read_json(path: Path) -> Any:
    """Return the content, or None where there is no file.

    Raises:
        DataError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); delete it to start afresh") from error


def _gone(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # the number is now someone else's process, or the run is: it cannot be told
    return False
