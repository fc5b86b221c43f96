"""`status.json` of a run folder: whether the run goes on, and how it ended."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from metagmvae.infra.runs.run_folder import METRICS, SETTINGS, STATUS, is_finished
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError

ENDED = ("FINISHED", "FAILED", "KILLED")


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
    metrics = run_dir / METRICS
    changed = round(1000 * metrics.stat().st_mtime) if metrics.exists() else None
    if saved is None:
        started = round(1000 * (run_dir / SETTINGS).stat().st_mtime)
        return ("FINISHED" if is_finished(metrics) else "KILLED"), started, changed
    if saved["status"] == "RUNNING" and _gone(saved["owner"]):
        return "KILLED", saved["started_ms"], changed
    return saved["status"], saved["started_ms"], saved["ended_ms"]


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
