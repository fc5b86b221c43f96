"""The way to an MLflow store: which one, made once, quiet, impatient, and with errors of one line.

Only `MlflowClient` is used, never MLflow's fluent functions: those keep a current run and a tracking URI for
the whole process, which a background thread beside a training run must not touch.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.configs.schema import TrackingSettings
from metagmvae.pipelines.records import DataError

ENVIRONMENT = {
    # MLflow waits 120 s and tries 8 times by default, which is minutes for a server that is down. What could
    # not be sent is sent by the next mirror, so one short retry is enough.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # Its own lines would stand in the middle of `--json` output.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A training run tells nobody outside about itself unless its owner asks for that.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set where the user has not set them."""


class TrackingError(RuntimeError):
    """The MLflow store cannot be reached or refused a request: one line; the run folder still holds all."""


class WarnOnce:
    """Tells on standard error what is wrong with a store, the first time only; it is tried again all the same."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.said = False

    def __call__(self, error: Exception) -> None:
        if self.said:
            return
        self.said = True
        known = isinstance(error, TrackingError | DataError)
        what = str(error) if known else f"MLflow: {type(error).__name__}: {error}"
        print(" ".join(f"{what}; {self.remedy}".split()), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Store:
    """An open MLflow store."""

    client: Any
    uri: str
    artifacts: str | None
    """Artifact location of an experiment that is made here; None: the server decides."""


def store_uri(tracking: TrackingSettings) -> str:
    """Return the tracking URI: the setting, else MLFLOW_TRACKING_URI, else SQLite in `tracking.store`.

    Relative SQLite paths become absolute, so that the same store is meant from every working directory.

    Raises:
        DataError: the setting holds a password; settings are stored with every run and every checkpoint.
    """
    if redact(tracking.uri) != tracking.uri:
        raise DataError("tracking.uri: settings must not hold a password; set MLFLOW_TRACKING_URI instead")
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{Path(tracking.store).absolute() / 'mlflow.db'}"
    path = _sqlite_path(uri)
    return f"sqlite:///{path.absolute()}" if path is not None else uri


def redact(uri: str) -> str:
    """Return the URI without user name and password, for messages, tags and files."""
    return re.sub(r"//[^/@]*@", "//", uri)


def connect(tracking: TrackingSettings, *, create: bool = True) -> Store:
    """Open the store; a new SQLite store is created, which takes some seconds of migrations.

    Raises:
        DataError: `create` is False and there is no store of that name.
        TrackingError: MLflow is not installed, or the store cannot be opened.
    """
    uri = store_uri(tracking)
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        if not create:
            raise DataError(f"no MLflow store at {path}; set tracking.uri or MLFLOW_TRACKING_URI")
        _make_folder(path.parent)
    with tracking_errors(uri):
        client = import_mlflow().MlflowClient(uri, registry_uri=uri)
    # MLflow's own default beside SQLite is `mlruns` in whatever the working directory is.
    return Store(client, uri, str(path.absolute().parent / "artifacts") if path is not None else None)


def experiment_id(store: Store, name: str) -> str:
    """Return the id of an experiment, which is made where there is none."""
    with tracking_errors(store.uri):
        found = store.client.get_experiment_by_name(name)
        if found is None:
            try:
                return store.client.create_experiment(name, artifact_location=store.artifacts)
            except import_mlflow().MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = store.client.get_experiment_by_name(name)  # another run made it just now
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow at {redact(store.uri)}: experiment {name!r} is deleted; restore it, or set tracking.experiment"
        )
    return found.experiment_id


def paginate(search: Callable[..., Any], **request: Any) -> Iterator[Any]:
    """All that a `search_…` of the client finds, page after page."""
    token = None
    while True:
        page = search(page_token=token, **request)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow, its HTTP client and its database raise into a TrackingError of one line."""
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    mlflow = import_mlflow()
    try:
        yield
    except (mlflow.MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        raise TrackingError(f"MLflow at {redact(uri)}: {_reason(error)}") from error
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"MLflow at {redact(uri)}: its database wants the Python package {error.name}, which is not installed"
        ) from error


def _reason(error: Exception) -> str:
    """The point of an error in one line, without a password; of a connection's, what the system said."""
    text = redact(str(error))
    system = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
    if "Max retries exceeded" in text and system:
        return f"not reachable ({system[1]})"
    if "Read timed out" in text or "timeout" in text.lower():
        return "not reachable (timed out)"
    return (text.splitlines() or [type(error).__name__])[0][:300]


def import_mlflow() -> Any:
    """Import MLflow, impatient and quiet; before any other import of it, as its warnings come at import.

    Raises:
        TrackingError: it is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ignore_warnings()
    try:
        import mlflow
    except ImportError as error:
        raise TrackingError("MLflow is not installed: pip install mlflow") from error
    for noisy in ("mlflow.store.db.utils", "alembic", "alembic.runtime.migration"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for each retry
    return mlflow


def ignore_warnings() -> None:
    """Ignore three warnings that MLflow 3.17 gives at import and that nobody can act on.

    Its tables use an SQLAlchemy option that SQLAlchemy 2.1 calls deprecated; mlflow.pyfunc warns of a type
    hint of its own; and it asks for type hints on `predict` even where a signature is given.
    """
    warnings.filterwarnings("ignore", message="The ``noload`` loader", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _make_folder(folder: Path) -> None:
    """Make the folder of a new SQLite store; MLflow itself would retry for minutes where it cannot write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"MLflow store folder {folder}: {error.strerror}; set tracking.store") from error
    if not os.access(folder, os.W_OK):
        raise TrackingError(f"MLflow store folder {folder}: not writable; set tracking.store")
