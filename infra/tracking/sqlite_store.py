"""An MLflow store in an SQLite file: its path, its creation, and its adaptation after it was moved or copied.

The file lies beside a folder `artifacts`. MLflow stores absolute paths of artifacts in the database, so a store that
was moved or copied would read and write at its old place. Before it is opened, these paths are changed to its new
place.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from metagmvae.infra.tracking.mlflow_environment import TrackingError, import_mlflow
from metagmvae.infra.tracking.tracking_errors import reason, tracking_errors
from metagmvae.pipelines.files import held_lock

LOG = logging.getLogger(__name__)
ARTIFACTS = "artifacts"
PATIENCE_S = 10.0
"""Longest wait for a database that another process has locked."""
FOREVER = -1.0
"""Patience for the lock of a store, which is held for seconds."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns (table, column) with absolute paths of artifacts."""


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of the file of `sqlite:///PATH`; None for another URI.

    SQLAlchemy reads `%20` in the URI as a space. A path that was put into the URI as it is, with `%` or `?` in the
    name of a folder, is recognised by that folder.
    """
    scheme, separator, raw = uri.partition(":///")
    if not separator or scheme.split("+")[0] != "sqlite" or not raw or raw.startswith((":memory:", "file:")):
        return None
    decoded = Path(unquote(raw.partition("?")[0])).absolute()
    literal = Path(raw).absolute()
    is_literal = literal.parent != decoded.parent and literal.parent.is_dir() and not decoded.exists()
    return literal if is_literal else decoded


def sqlite_uri(path: Path) -> str:
    """Return the URI of an SQLite file for MLflow."""
    if not set("%?").intersection(str(path)):
        return f"sqlite:///{path}"
    # MLflow would create the folder of the quoted path for `sqlite:///`, but not if the driver is named.
    return f"sqlite+pysqlite:///{quote(str(path))}"


def artifact_location(path: Path) -> str:
    """Return the location of the artifacts of the store in the file `path`."""
    folder = path.parent / ARTIFACTS
    return folder.as_uri() if "%" in str(folder) else str(folder)  # MLflow decodes `%20` in a path, too


def is_empty(path: Path) -> bool:
    """Return whether there is no store: no file, or one without content."""
    return not path.exists() or (path.is_file() and not path.stat().st_size)


def create_store(path: Path) -> None:
    """Create the store, unless another process creates it at the same time; it appears when it is complete.

    Raises:
        TrackingError: the folder cannot be written.
        DataError: it cannot be locked.
    """
    _create_folder(path.parent)
    unfinished = path.with_name(f".{path.name}.new")
    with held_lock(_lock_file(path), FOREVER):
        if not is_empty(path):
            return
        unfinished.unlink(missing_ok=True)  # of a process that was killed
        uri = sqlite_uri(unfinished)
        with tracking_errors(sqlite_uri(path)):
            import_mlflow().MlflowClient(uri, registry_uri=uri)
            os.replace(unfinished, path)


def adapt_store(path: Path) -> None:
    """Check that the file is an MLflow store, and adapt it to its place if it was moved or copied.

    Raises:
        TrackingError: it is no MLflow store, cannot be read, or lies apart from its artifacts.
    """
    try:
        with closing(_open(path)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"experiments", "runs"} <= tables:
                raise TrackingError(f"{path}: not an MLflow store (it has no table of runs); name another file")
            if not _former_roots(path, database):
                return
        with held_lock(_lock_file(path), FOREVER), closing(_open(path)) as database:
            database.execute("BEGIN IMMEDIATE")
            for root in _former_roots(path, database):  # again: another process may have adapted it meanwhile
                _move_locations(path, root, database, tables)
            database.commit()
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(f"MLflow at {sqlite_uri(path)}: {reason(error)}") from error


def _open(path: Path) -> sqlite3.Connection:
    mode = "rw" if os.access(path, os.W_OK) else "ro"
    uri = f"file:{quote(str(path))}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=PATIENCE_S, isolation_level=None)


def _former_roots(path: Path, database: sqlite3.Connection) -> list[str]:
    """Return the locations of artifact folders of this store at the places where it was before.

    A folder `artifacts` elsewhere is a former one if it no longer exists (the store was moved), or if a database of the
    same name lies beside it (the store was copied).
    """
    here = path.parent / ARTIFACTS
    roots = []
    for (location,) in database.execute("SELECT DISTINCT artifact_location FROM experiments"):
        folder = _local_path(location or "")
        root = next((part for part in (folder, *folder.parents) if part.name == ARTIFACTS), None) if folder else None
        if folder is None or root is None or os.path.realpath(root) == os.path.realpath(here):
            continue
        original = root.parent / path.name
        copied = original.exists() and not original.samefile(path)
        if copied or not root.exists():
            roots.append(root.as_uri() if location.startswith("file://") else str(root))
    return list(dict.fromkeys(roots))


def _local_path(location: str) -> Path | None:
    """Return the absolute path that a location names; None for an object store or a server."""
    path = unquote(urlsplit(location).path) if location.startswith("file://") else location
    return Path(path) if path.startswith("/") else None


def _move_locations(path: Path, root: str, database: sqlite3.Connection, tables: set[str]) -> None:
    """Change the locations inside `root` to the folder of artifacts beside the database."""
    inside = "({0} = :root OR substr({0}, 1, length(:root) + 1) = :root || '/')"
    columns = [(table, column) for table, column in LOCATIONS if table in tables]
    values = {"root": root, "here": artifact_location(path)}
    if not (path.parent / ARTIFACTS).is_dir():
        used = [
            table
            for table, column in columns
            if table != "experiments"
            and database.execute(f"SELECT 1 FROM {table} WHERE {inside.format(column)} LIMIT 1", values).fetchone()
        ]
        if used:
            raise TrackingError(
                f"MLflow store {path} lies apart from its artifacts, which were in {root}: copy that folder "
                f"to {path.parent / ARTIFACTS}, or name the store at its former place"
            )
    changed = 0
    for table, column in columns:
        new = f":here || substr({column}, length(:root) + 1)"
        update = f"UPDATE {table} SET {column} = {new} WHERE {inside.format(column)}"
        changed += database.execute(update, values).rowcount
    LOG.warning(
        "MLflow store %s: was moved or copied from %s; %d locations of artifacts in it now name its present place",
        path,
        root,
        changed,
    )


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _create_folder(folder: Path) -> None:
    """Create the folder of a new store; where it cannot write, MLflow itself would retry for minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"MLflow store folder {folder}: {error.strerror}; set tracking.store") from error
    if not os.access(folder, os.W_OK):
        raise TrackingError(f"MLflow store folder {folder}: not writable; set tracking.store")
