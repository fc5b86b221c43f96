"""Connection to an MLflow store: choice of the store, short timeouts, errors of one line.

Only `MlflowClient` is used, never MLflow's fluent functions: they keep a current run and a tracking URI for the whole
process, which a background thread beside a training run must not change.
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

from metagmvae.configs.credentials import redact as redact
from metagmvae.configs.schema import TrackingSettings
from metagmvae.pipelines.records import DataError

ENVIRONMENT = {
    # By default MLflow waits 120 s and tries 8 times, which takes minutes for a server that is down. The next upload
    # sends what this one could not, so one short retry is enough.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # MLflow's own lines would appear in the middle of `--json` output.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Usage data leaves this machine only if the user asks for it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment variables that are set unless the user has set them."""


class TrackingError(RuntimeError):
    """The MLflow store cannot be reached or refused a request. The message is one line; the run folder is complete."""


class WarnOnce:
    """Prints the first error of a store on stderr, in one line with the remedy; later errors are not printed."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.warned = False

    def __call__(self, error: Exception) -> None:
        if self.warned:
            return
        self.warned = True
        known = isinstance(error, TrackingError | DataError)
        message = str(error) if known else f"MLflow: {type(error).__name__}: {error}"
        print(" ".join(f"{message}; {self.remedy}".split()), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Store:
    """An open MLflow store."""

    client: Any
    uri: str
    artifacts: str | None
    """Artifact location of experiments that are created here; None: the server decides."""


def store_uri(tracking: TrackingSettings) -> str:
    """Return the tracking URI: the setting, else MLFLOW_TRACKING_URI, else SQLite in `tracking.store`.

    Relative SQLite paths become absolute, so that they name the same store in every working directory.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{Path(tracking.store).absolute() / 'mlflow.db'}"
    path = _sqlite_path(uri)
    return f"sqlite:///{path.absolute()}" if path is not None else uri


def connect(tracking: TrackingSettings, *, create: bool = True) -> Store:
    """Open the store. A missing SQLite store is created, which takes some seconds for the migrations.

    Raises:
        DataError: `create` is False and the SQLite store does not exist.
        TrackingError: MLflow is not installed, or the store cannot be opened.
    """
    uri = store_uri(tracking)
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        if not create:
            raise DataError(f"no MLflow store at {path}; set tracking.uri or MLFLOW_TRACKING_URI")
        _create_folder(path.parent)
    with tracking_errors(uri):
        client = import_mlflow().MlflowClient(uri, registry_uri=uri)
    # MLflow's default for SQLite is `mlruns` in the working directory, which changes between calls.
    return Store(client, uri, str(path.absolute().parent / "artifacts") if path is not None else None)


def experiment_id(store: Store, name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    with tracking_errors(store.uri):
        experiment = store.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return store.client.create_experiment(name, artifact_location=store.artifacts)
            except import_mlflow().MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = store.client.get_experiment_by_name(name)  # another run has just created it
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow at {redact(store.uri)}: experiment {name!r} is deleted; restore it, or set tracking.experiment"
        )
    return experiment.experiment_id


def paginate(search: Callable[..., Any], **request: Any) -> Iterator[Any]:
    """Yield all results of a `search_…` method of the client, page after page."""
    token = None
    while True:
        page = search(page_token=token, **request)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Convert errors of MLflow, its HTTP client and its database to a TrackingError of one line."""
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    mlflow = import_mlflow()
    try:
        yield
    except (mlflow.MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        raise TrackingError(f"MLflow at {redact(uri)}: {_reason(error)}") from error
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"MLflow at {redact(uri)}: its database needs the Python package {error.name}: pip install {error.name}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the reason in one line, without a password; for a failed connection, the operating system's message."""
    message = redact(str(error))
    errno = re.search(r"\[Errno -?\d+\] ([\w ]+)", message)
    if "Max retries exceeded" in message and errno:
        return f"not reachable ({errno[1]})"
    if "Read timed out" in message or "timeout" in message.lower():
        return "not reachable (timed out)"
    return (message.splitlines() or [type(error).__name__])[0][:300]


def import_mlflow() -> Any:
    """Import MLflow with short timeouts and without its warnings, some of which it gives when it is imported.

    Raises:
        TrackingError: MLflow is not installed.
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
    """Ignore warnings that MLflow 3.17 gives at import and that users cannot act on.

    Its tables use an option that SQLAlchemy 2.1 deprecates, mlflow.pyfunc warns about a type hint of its own, and it
    asks for type hints on `predict` even where a signature is given.
    """
    warnings.filterwarnings("ignore", message="The ``noload`` loader", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _create_folder(folder: Path) -> None:
    """Create the folder of a new SQLite store; where it cannot write, MLflow itself would retry for minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"MLflow store folder {folder}: {error.strerror}; set tracking.store") from error
    if not os.access(folder, os.W_OK):
        raise TrackingError(f"MLflow store folder {folder}: not writable; set tracking.store")
