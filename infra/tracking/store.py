"""Connection to an MLflow store: which one, under which name a run records it, and its experiments.

Only `MlflowClient` is used, never MLflow's fluent functions: they keep a current run and a tracking URI for the whole
process, which a background thread beside a training run must not change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from metagmvae.configs.credentials import redact
from metagmvae.configs.mlflow_names import check_tracking_uri
from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.tracking.mlflow_environment import TrackingError, import_mlflow, name_unused_variables
from metagmvae.infra.tracking.sqlite_store import (
    adapt_store,
    artifact_location,
    create_store,
    is_empty,
    sqlite_path,
    sqlite_uri,
)
from metagmvae.infra.tracking.tracking_errors import ignored, tracking_errors
from metagmvae.pipelines.files import local_folder
from metagmvae.pipelines.records import DataError

DATABASE = "mlflow.db"
"""File of the default store."""
DATABASES = ("postgresql", "mysql", "mssql")
DEFAULT_PORTS = {"http": 80, "https": 443}


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

    Raises:
        DataError: MLFLOW_TRACKING_URI is a host and port without `http://`.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return sqlite_uri(Path(os.path.abspath(tracking.store)) / DATABASE)
    try:
        check_tracking_uri(uri)
    except ValueError as error:
        raise DataError(f"MLFLOW_TRACKING_URI = {error}") from error
    path = sqlite_path(uri)
    return uri if path is None else sqlite_uri(Path(os.path.abspath(path)))


def store_key(uri: str) -> str:
    """Return the name under which a run records a store: the same for all spellings of its URI, without a password.

    A server's name is in lower case, without a trailing slash or a default port, and `localhost` is 127.0.0.1; a path
    is absolute and without symbolic links.
    """
    uri = redact(uri)
    path = sqlite_path(uri)
    if path is not None:
        return sqlite_uri(Path(os.path.realpath(path)))
    parts = urlsplit(uri)
    if parts.scheme.lower() not in DEFAULT_PORTS:
        is_path = parts.scheme == "file" or ("://" not in uri and not uri.startswith("databricks"))
        return os.path.realpath(local_folder(uri)) if is_path else uri
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    try:
        port = parts.port
    except ValueError:  # not a number; MLflow refuses the URI
        return uri
    host = "127.0.0.1" if host in ("localhost", "::1") else f"[{host}]" if ":" in host else host
    place = host if port in (None, DEFAULT_PORTS[scheme]) else f"{host}:{port}"
    return f"{scheme}://{place}{parts.path.rstrip('/')}"


def connect(tracking: TrackingSettings, *, create: bool = True) -> Store:
    """Open the store. A missing SQLite store is created, which takes some seconds for the migrations.

    Raises:
        DataError: `create` is False and the SQLite store does not exist.
        TrackingError: MLflow is not installed, or the store cannot be opened.
    """
    uri = store_uri(tracking)
    mlflow = import_mlflow()  # first: without MLflow a missing store is not the problem
    name_unused_variables(uri)
    path = sqlite_path(uri)
    if path is not None:
        if is_empty(path):
            if not create:
                raise DataError(f"no MLflow store at {path}; set tracking.uri or MLFLOW_TRACKING_URI")
            create_store(path)
        adapt_store(path)
    elif urlsplit(uri).scheme.split("+")[0] in DATABASES:
        _try_database(uri)
    with tracking_errors(uri):
        client = mlflow.MlflowClient(uri, registry_uri=uri)
    _forget_artifact_places()
    # MLflow's default for SQLite is `mlruns` in the working directory, which changes between calls.
    return Store(client, uri, None if path is None else artifact_location(path))


def _try_database(uri: str) -> None:
    """Connect to a database once: MLflow itself would try for minutes, without a word.

    Raises:
        TrackingError: it does not answer, or refuses.
    """
    from sqlalchemy import create_engine

    with tracking_errors(uri):
        engine = create_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()


def experiment_id(store: Store, name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    with tracking_errors(store.uri):
        experiment = store.client.get_experiment_by_name(name)
        if experiment is None:
            with ignored("RESOURCE_ALREADY_EXISTS"):  # another run may have just created it
                return store.client.create_experiment(name, artifact_location=store.artifacts)
            experiment = store.client.get_experiment_by_name(name)
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


def registered_models(store: Store) -> dict[str, Any]:
    """Return MLflow's entries of all registered models by name."""
    return {model.name: model for model in paginate(store.client.search_registered_models)}


def versions_of(store: Store, name: str) -> list[Any]:
    """Return MLflow's entries of all versions of a registered model; a search gives no aliases."""
    return list(paginate(store.client.search_model_versions, filter_string=f"name = '{name}'"))


def _forget_artifact_places() -> None:
    """Empty MLflow's cache of the artifact folders of runs.

    It has no entry for the store, so in one process a copy of a store would be given the folders of the original.
    """
    from mlflow.tracking._tracking_service import utils

    getattr(utils, "_artifact_repos_cache", {}).clear()
