"""`tracking.json` in a run folder: which MLflow stores the run was uploaded to, and how far."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from pydantic import BaseModel

from metagmvae.configs.credentials import redact
from metagmvae.infra.runs.folder_identity import FolderIdentity
from metagmvae.infra.runs.run_folder import CURSOR, TRACKING_LOCK
from metagmvae.infra.tracking.mlflow_environment import TrackingError
from metagmvae.infra.tracking.sqlite_store import sqlite_path, sqlite_uri
from metagmvae.infra.tracking.store import store_key
from metagmvae.pipelines.files import check_document, held_lock, read_json, write_json


class Cursor:
    """What one MLflow store already has of a run. It is saved after the store accepted a request, never before.

    The file holds one entry per store, and `run_id` and `uri` of the store that the run was uploaded to last. An entry
    that came with a copy of another folder is not used: the copy becomes a run of its own. A folder that was moved or
    copied together with its store is the run that the store has of it.
    """

    def __init__(self, run_dir: Path, uri: str) -> None:
        """Read the cursor of the store with this URI."""
        self.path = run_dir / CURSOR
        self.uri, self.shown = store_key(uri), redact(uri)
        self.content = _read(run_dir)
        stores = self.content["stores"]
        entry = stores.get(self.uri)
        if entry is None or not _is_own(entry, run_dir):
            known = (e["key"] for uri, e in stores.items() if _has_moved_along(e, uri, run_dir, self.uri))
            entry = {"key": next(known, uuid.uuid4().hex), "run_id": None, "lines": {}, "artifacts": {}}
        self.entry: dict[str, Any] = entry
        stores[self.uri] = entry
        entry["folder"] = FolderIdentity.of(run_dir).model_dump()

    def save(self) -> None:
        """Write the cursor to disk."""
        write_json(self.path, self.content | {"run_id": self.entry["run_id"], "uri": self.shown})


def recorded_uri(run_dir: Path) -> str:
    """Return the URI of the store that the run was uploaded to last, from whatever place; empty if it never was."""
    return str(_read(run_dir).get("uri", ""))


def last_uri(run_dir: Path) -> str:
    """Return the URI of the store that the run was uploaded to last, if that was from this folder; else empty.

    If the folder was moved together with an SQLite store, it is the URI of the store at its present place.
    """
    content = _read(run_dir)
    uri, folder = str(content.get("uri", "")), _last_entry(content).get("folder")
    if not uri or folder is None or not FolderIdentity.model_validate(folder).is_here(run_dir):
        return ""
    path = sqlite_path(uri)
    if path is None:
        return uri
    present = os.path.join(os.path.realpath(run_dir), os.path.relpath(path, folder["path"]))
    stores = (file for file in (Path(os.path.normpath(present)), path) if file.exists())
    return next(map(sqlite_uri, stores), "")


def last_entry(run_dir: str | Path) -> dict[str, Any]:
    """Return the entry of the store that the run was last uploaded to; empty if it never was."""
    return _last_entry(_read(Path(run_dir)))


def _last_entry(content: dict[str, Any]) -> dict[str, Any]:
    uri = content.get("uri")
    entry: dict[str, Any] = content["stores"].get(store_key(uri), {}) if uri else {}
    return entry


def _is_own(entry: dict[str, Any], run_dir: Path) -> bool:
    """Return whether an entry was written in this folder, at its place or before it was moved.

    Entries of older versions do not say where they were written; they are taken for those of this folder.
    """
    folder = entry.get("folder")
    if folder is None:
        return True
    identity = FolderIdentity.model_validate(folder)
    return identity.is_here(run_dir) or identity.is_moved(run_dir, CURSOR)


def _has_moved_along(entry: dict[str, Any], uri: str, run_dir: Path, present_uri: str) -> bool:
    """Return whether the run folder lies as before to its store, and both lie elsewhere than before."""
    former, present = sqlite_path(uri), sqlite_path(present_uri)
    if former is None or present is None or former == present or "folder" not in entry:
        return False
    before = os.path.relpath(entry["folder"]["path"], os.path.dirname(former))
    return before == os.path.relpath(os.path.realpath(run_dir), os.path.dirname(os.path.realpath(present)))


@contextmanager
def upload_lock(run_dir: Path) -> Iterator[None]:
    """Exclusive lock for uploading a run folder. The operating system releases it when the process dies.

    Raises:
        TrackingError: another process, or another thread of this one, is uploading the run.
        DataError: the folder cannot be locked.
    """
    try:
        with held_lock(run_dir / TRACKING_LOCK):
            yield
    except Timeout as error:
        raise TrackingError(f"{run_dir}: another process is uploading it to MLflow; try again later") from error


class _Entry(BaseModel, strict=True):
    key: str
    run_id: str | None
    lines: dict[str, dict[str, Any]]
    artifacts: dict[str, Any]
    folder: FolderIdentity | None = None


class _Cursor(BaseModel, strict=True):
    """Content of `tracking.json`."""

    stores: dict[str, _Entry]
    run_id: str | None = None
    uri: str = ""


def _read(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CURSOR
    content: dict[str, Any] = read_json(path) if path.exists() else {"version": 1, "stores": {}}
    check_document(_Cursor, content, path, "delete the file; the run is then uploaded as a new one")
    stores: dict[str, dict[str, Any]] = {}
    for uri, entry in content["stores"].items():  # an older version kept one entry for each spelling of a URI
        key = store_key(uri)
        if key not in stores or stores[key]["run_id"] is None or uri == content.get("uri"):
            stores[key] = entry
    return content | {"stores": stores}
