"""`tracking.json` in a run folder: which MLflow stores the run was uploaded to, and how far."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from metagmvae.infra.runs.run_folder import CURSOR, TRACKING_LOCK
from metagmvae.infra.tracking.store import TrackingError
from metagmvae.pipelines.files import check_document, read_json, write_json


class Cursor:
    """What one MLflow store already has of a run. It is saved after the store accepted a request, never before.

    The file holds one entry per store, and `run_id` and `uri` of the store that the run was uploaded to last.
    """

    def __init__(self, run_dir: Path, uri: str) -> None:
        """Read the cursor of the store with this URI, given without a password."""
        self.path = run_dir / CURSOR
        self.uri = uri
        self.content = _read(run_dir)
        empty: dict[str, Any] = {"key": uuid.uuid4().hex, "run_id": None, "lines": {}, "artifacts": {}}
        self.entry = self.content["stores"].setdefault(uri, empty)

    def save(self) -> None:
        """Write the cursor to disk."""
        write_json(self.path, self.content | {"run_id": self.entry["run_id"], "uri": self.uri})


def last_uri(run_dir: str | Path) -> str:
    """Return the URI of the store that the run was uploaded to last; empty if it never was."""
    return str(_read(Path(run_dir)).get("uri", ""))


def last_entry(run_dir: str | Path) -> dict[str, Any]:
    """Return what the store that the run was uploaded to last has of it; empty if it was never uploaded."""
    content = _read(Path(run_dir))
    entry: dict[str, Any] = content["stores"].get(content.get("uri"), {})
    return entry


@contextmanager
def upload_lock(run_dir: Path) -> Iterator[None]:
    """Exclusive lock for uploading a run folder. The operating system releases it when the process dies.

    Raises:
        TrackingError: another process, or another thread of this one, is uploading the run.
    """
    try:
        with FileLock(run_dir / TRACKING_LOCK, timeout=0):
            yield
    except Timeout as error:
        raise TrackingError(f"{run_dir}: another process is uploading it to MLflow; try again later") from error


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    key: str
    run_id: str | None
    lines: dict[str, dict[str, Any]]
    artifacts: dict[str, Any]


class _Cursor(BaseModel):
    """Content of `tracking.json`."""

    model_config = ConfigDict(strict=True)

    stores: dict[str, _Entry]
    run_id: str | None = None
    uri: str = ""


def _read(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CURSOR
    content: dict[str, Any] = read_json(path) if path.exists() else {"version": 1, "stores": {}}
    check_document(_Cursor, content, path, "delete the file; the run is then uploaded as a new one")
    return content
