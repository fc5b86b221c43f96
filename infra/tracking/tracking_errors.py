"""Errors of an MLflow store, as one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from metagmvae.configs.credentials import redact
from metagmvae.infra.tracking.mlflow_environment import TrackingError, import_mlflow
from metagmvae.pipelines.records import DataError

LOG = logging.getLogger(__name__)
REMEDIES = {
    "attempt to write a readonly database": "check the permissions of the file and its folder",
    "database is locked": "another process holds it; try again when that has ended",
    "unable to open database file": "check the path and the permissions of its folder",
}
"""What to do about an error of SQLite."""


class WarnOnce:
    """Logs the first error of a store as a warning of one line with the remedy; later errors are not logged."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self.warned = False

    def __call__(self, error: Exception) -> None:
        if self.warned:
            return
        self.warned = True
        known = isinstance(error, TrackingError | DataError)
        message = str(error) if known else f"MLflow: {type(error).__name__}: {error}"
        LOG.warning("%s", " ".join(f"{message}; {self.remedy}".split()))


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Convert errors of MLflow, its HTTP client and its database to a TrackingError of one line."""
    mlflow = import_mlflow()
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (mlflow.MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        raise TrackingError(f"MLflow at {redact(uri)}: {reason(error)}") from error
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"MLflow at {redact(uri)}: its database needs the Python package {error.name}: pip install {error.name}"
        ) from error


def reason(error: Exception) -> str:
    """Return the reason in one line, without a password; for a failed connection, the operating system's message."""
    message = redact(str(error))
    errno = re.search(r"\[Errno -?\d+\] ([\w ]+)", message)
    if "Max retries exceeded" in message and errno:
        return f"not reachable ({errno[1]})"
    if "Read timed out" in message or "timeout" in message.lower():
        return "not reachable (timed out)"
    for text, remedy in REMEDIES.items():
        if text in message:
            return f"{text}; {remedy}"
    return (message.splitlines() or [type(error).__name__])[0][:300]
