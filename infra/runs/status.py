"""`status.json` of a run folder: whether the run is going on, and how it ended."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import BaseModel, Field

from metagmvae.infra.runs.folder_identity import FolderIdentity
from metagmvae.infra.runs.run_folder import METRICS, SETTINGS, STATUS, Count, is_finished
from metagmvae.pipelines.files import check_document, read_json, write_json

CLOCK_STEP_S = 60.0
"""A process that began so much later than its status was written is another one; clocks are set in smaller steps."""
ENDED = ("FINISHED", "FAILED", "KILLED")


def final_status(kind: type[BaseException] | None) -> str:
    """Return the status of work that ended with this type of exception; None: without one."""
    return "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"


def write_status(run_dir: Path, status: str) -> None:
    """Write the status (RUNNING, or one of ENDED) to the run folder; the first start time is kept.

    With RUNNING the identity of the folder is recorded too: it is where the run was made.
    """
    previous = _read(run_dir)
    now = round(1000 * time.time())
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    started = previous.get("started_ms", now)
    ended = max(now, started) if status in ENDED else None  # the clock may have been set back meanwhile
    times = {"started_ms": started, "ended_ms": ended}
    folder = FolderIdentity.of(run_dir).model_dump() if status == "RUNNING" else previous.get("folder")
    write_json(run_dir / STATUS, {"status": status, **times, "owner": owner, "folder": folder})


def made_in(run_dir: Path) -> FolderIdentity | None:
    """Return the identity of the folder in which the run was made; None for a run of an older version."""
    folder = _read(run_dir).get("folder")
    return None if folder is None else FolderIdentity.model_validate(folder)


def read_status(run_dir: Path) -> tuple[str, int, int | None]:
    """Return (status, start, end), times in ms since 1970; the end is None while the run is going on.

    A run whose status is RUNNING was killed if its process on this machine no longer exists, or if its number belongs
    to a later process. A run that was never tracked has no status file: it started when its settings were written, and
    ended at its last metric line.
    """
    saved = _read(run_dir)
    metrics = run_dir / METRICS
    last_change = round(1000 * metrics.stat().st_mtime) if metrics.exists() else None
    if not saved:
        started = round(1000 * (run_dir / SETTINGS).stat().st_mtime)
        return ("FINISHED" if is_finished(metrics) else "KILLED"), started, last_change
    owner = saved["owner"]
    here = owner["host"] == socket.gethostname()
    if saved["status"] == "RUNNING" and here and not _is_alive(owner["pid"], (run_dir / STATUS).stat().st_mtime):
        return "KILLED", saved["started_ms"], last_change
    return saved["status"], saved["started_ms"], saved["ended_ms"]


def _is_alive(pid: int, written_s: float) -> bool:
    """Return whether the process that wrote the status at a time still exists.

    After a restart of the machine, or in the next container, another process may have its number.
    """
    try:
        return pid == os.getpid() or psutil.Process(pid).create_time() < written_s + CLOCK_STEP_S
    except psutil.NoSuchProcess:
        return False


class _Owner(BaseModel, strict=True):
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    host: str


class _Status(BaseModel, strict=True):
    """Content of `status.json`."""

    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    started_ms: Count
    ended_ms: Count | None
    owner: _Owner
    folder: FolderIdentity | None = None


def _read(run_dir: Path) -> dict[str, Any]:
    path = run_dir / STATUS
    if not path.exists():
        return {}
    saved: dict[str, Any] = read_json(path)
    check_document(_Status, saved, path, "delete the file")
    return saved
