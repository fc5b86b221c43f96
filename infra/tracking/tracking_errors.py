"""Errors of an MLflow store, as one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

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
PACKAGES = {"MySQLdb": "mysqlclient"}
"""Package of a module of another name."""
CREDENTIALS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to those of the server"
)
STATUS_REMEDIES = {401: CREDENTIALS, 403: CREDENTIALS, 429: "try again later"}
"""What to do about a status of HTTP. Of those of 500 and above the log of the server knows the reason."""


def warn(error: Exception, remedy: str) -> None:
    """Log an error of a store as a warning of one line with the remedy."""
    known = isinstance(error, TrackingError | DataError)
    message = str(error) if known else f"MLflow: {type(error).__name__}: {error}"
    LOG.warning("%s", " ".join(f"{message}; {remedy}".split()))


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
        package = PACKAGES.get(error.name or "", error.name)
        raise TrackingError(
            f"MLflow at {redact(uri)}: its database needs the Python package {package}: pip install {package}"
        ) from error


@contextmanager
def ignored(*codes: str) -> Iterator[None]:
    """Leave the block at an error of MLflow with one of these codes, such as RESOURCE_DOES_NOT_EXIST."""
    try:
        yield
    except import_mlflow().MlflowException as error:
        if error.error_code not in codes:
            raise


def reason(error: Exception) -> str:
    """Return the reason in one line, without a password; for a failed connection, the operating system's message."""
    message = redact(str(error))
    failed = re.search(r"\[(?:Errno -?\d+|SSL: \w+)\] ([\w -]+)", message)
    if "Max retries exceeded" in message and failed:
        return f"not reachable ({'TLS: ' if 'SSL' in failed[0] else ''}{failed[1].strip()})"
    if status := re.search(r"too many (\d{3}) error responses|failed with error code (\d{3}) ", message):
        return _answer(int(status[1] or status[2]))
    if "not in a valid JSON format" in message:
        return "what answers there is no MLflow server, but perhaps a proxy or a page for logging in; check the URI"
    if "Read timed out" in message or "timeout" in message.lower():
        return "not reachable (timed out)"
    if "Connection aborted" in message or "Connection broken" in message:
        return "not reachable (the connection was broken off)"
    for text, remedy in REMEDIES.items():
        if text in message:
            return f"{text}; {remedy}"
    return (message.splitlines() or [type(error).__name__])[0][:300]


def _answer(status: int) -> str:
    """Describe a status of HTTP that came without a message of MLflow, with what to do about it."""
    name = next((f" ({known.phrase})" for known in HTTPStatus if known == status), "")
    remedy = "see the log of the server" if status >= 500 else STATUS_REMEDIES.get(status, "check the URI")
    return f"answers with status {status}{name}; {remedy}"
