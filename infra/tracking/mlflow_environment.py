"""Import of MLflow, and the environment variables of MLflow: which are set here, and which are not used."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from typing import Any

from metagmvae.pipelines.optional_packages import MissingPackageError, optional_package

LOG = logging.getLogger(__name__)
ENVIRONMENT = {
    # By default MLflow waits 120 s and tries 8 times, which takes minutes for a server that is down. The next upload
    # sends what this one could not, so one short retry is enough.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # A server or proxy that is overloaded may ask for a pause of any length, during which nothing else is uploaded.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    # MLflow's own lines would appear in the middle of `--json` output.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Usage data leaves this machine only if the user asks for it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment variables that are set unless the user has set them."""

UNUSED = {
    "MLFLOW_RUN_ID": "each run folder is an MLflow run of its own",
    "MLFLOW_EXPERIMENT_ID": "set MLFLOW_EXPERIMENT_NAME or tracking.experiment",
    "MLFLOW_REGISTRY_URI": "models are registered in the tracking store",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "a run is uploaded by a thread, and recorded when the store has accepted it",
    "MLFLOW_RUN_CONTEXT": "tags are those of the run folder",
    "MLFLOW_ACTIVE_MODEL_ID": "a model is logged when it is registered",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "the machine is sampled at each upload",
    "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING": "the machine is sampled at each upload",
    "MLFLOW_SYSTEM_METRICS_NODE_ID": "the machine of the driver is sampled",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT": "artifacts lie beside the SQLite database, or where the server keeps them",
    "MLFLOW_ARTIFACTS_DESTINATION": "artifacts lie beside the SQLite database, or where the server keeps them",
}
"""Environment variables of MLflow's clients that this program does not use, and the reason. MLflow itself obeys the
others, such as MLFLOW_HTTP_…, MLFLOW_TRACKING_… (user, password, token, certificate) and MLFLOW_S3_…"""


class TrackingError(RuntimeError):
    """The MLflow store cannot be reached or refused a request. The message is one line; the run folder is complete."""


class MissingMlflowError(TrackingError, MissingPackageError):
    """MLflow is not installed; the message is one line with the remedy."""


def import_mlflow(needed_by: str = "the MLflow store", otherwise: str = "") -> Any:
    """Import MLflow with short timeouts and without its warnings, some of which it gives when it is imported.

    Args:
        needed_by, otherwise: see `optional_package`.

    Raises:
        MissingMlflowError: MLflow is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ignore_warnings()
    try:
        with optional_package("mlflow", needed_by, otherwise):
            import mlflow
    except MissingPackageError as error:
        raise MissingMlflowError(str(error)) from error
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
    # An error of the database is raised as well, and reported in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for each retry
    return mlflow


def ignore_warnings() -> None:
    """Ignore warnings that MLflow 3.17 gives at import and that users cannot act on.

    Its tables use an option that SQLAlchemy 2.1 deprecates, mlflow.pyfunc warns about a type hint of its own, and it
    asks for type hints on `predict` even where a signature is given.
    """
    warnings.filterwarnings("ignore", message="The ``noload`` loader", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)


def wants_system_metrics() -> bool:
    """Return whether MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is not switched off."""
    return os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").strip().lower() not in ("false", "0")


@cache
def name_unused_variables(uri: str) -> None:
    """Print one line on stderr that names the variables of MLflow that are set but not used; once per process.

    A registry URI that is the tracking URI asks for what is done anyway.
    """
    asked = {name: os.environ.get(name, "") for name in UNUSED}
    if asked["MLFLOW_REGISTRY_URI"].rstrip("/") == uri.rstrip("/"):
        asked["MLFLOW_REGISTRY_URI"] = ""
    if asked["MLFLOW_ENABLE_ASYNC_LOGGING"].lower() in ("false", "0"):
        asked["MLFLOW_ENABLE_ASYNC_LOGGING"] = ""
    if names := [f"{name} ({UNUSED[name]})" for name, value in asked.items() if value]:
        LOG.warning("metagmvae does not use %s", ", ".join(names))
