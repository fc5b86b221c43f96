"""Registers the model of a run as a version of an MLflow registered model, with tags that say what it was made of."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from metagmvae.configs.credentials import redact
from metagmvae.configs.load import fingerprint
from metagmvae.configs.mlflow_names import check_alias, check_model
from metagmvae.configs.schema import TrackingSettings
from metagmvae.evaluation.provenance import installed_version
from metagmvae.infra.registry.alias_change import set_alias_if_free
from metagmvae.infra.registry.alias_history import alias_version
from metagmvae.infra.registry.own_wheel import write_wheel
from metagmvae.infra.runs.run_folder import REGISTERING_LOCK, read_record
from metagmvae.infra.tracking.convert import flatten
from metagmvae.infra.tracking.mlflow_environment import TrackingError, import_mlflow
from metagmvae.infra.tracking.model_scores import log_scores
from metagmvae.infra.tracking.run_uploader import upload_run
from metagmvae.infra.tracking.store import Store, connect, paginate, versions_of
from metagmvae.infra.tracking.tracking_errors import ignored, tracking_errors
from metagmvae.pipelines.files import held_lock
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.trainer.package import LoadedModel, load_model, save_package

PATIENCE_S = 120.0
"""Longest wait for another process that registers the same run."""
ENTRY = Path(__file__).with_name("pyfunc_entry.py")
REQUIREMENTS = ("torch", "torchvision", "safetensors", "numpy", "mlflow")
"""Pinned to the versions that the model was registered with; the wheel of this package names all others."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    uri: str
    """`models:/name/version`."""
    alias: str
    """Alias that points to this version now; empty if none was requested, or another version has it."""


def register(
    run_dir: str | Path,
    tracking: TrackingSettings,
    name: str | None = None,
    alias: str | None = None,
    shot: int | None = None,
    results: Mapping[str, Any] | None = None,
    *,
    once: bool = False,
) -> RegisteredVersion:
    """Upload a run, log its model in the MLflow run, and create a version of a registered model from it.

    Args:
        run_dir: run folder with a checkpoint.
        tracking: MLflow store; `register_as` and `alias` are the defaults of the next two arguments.
        name: registered model, which is created if it does not exist.
        alias: moved to this version from any other one; empty: no alias; None: `tracking.alias`, if no version has it
            yet (a champion is replaced by `metagmvae promote`, not by a training).
        shot: which best model, if the run has one for each shot.
        results: accuracies and intervals, stored as tags `results.…` of the version.
        once: take the version that already holds this model of the run, if there is one.

    Raises:
        DataError: there is no name, or no trained model in the folder.
        TrackingError: the store cannot be reached or refuses.
    """
    name = check_model_name(name or tracking.register_as)
    check_alias_name(alias or tracking.alias)
    loaded = load_model(run_dir, shot=shot)
    with _registering(Path(run_dir)):
        run_id = upload_run(run_dir, tracking).run_id
        store = connect(tracking)
        version = registered_version(store, name, run_id, loaded) if once else ""
        if not version:
            tags = _version_tags(loaded, Path(run_dir), run_id, shot, results or {})
            with tracking_errors(store.uri):
                version = _create_version(store, name, run_id, loaded, tags, Path(run_dir))
    with tracking_errors(store.uri):
        if alias:
            store.client.set_registered_model_alias(name, alias, version)
    if alias is None:
        default = tracking.alias
        given = default and set_alias_if_free(store, name, default, version)
        alias = default if given or (default and alias_version(store, name, default) == version) else ""
    return RegisteredVersion(name, version, f"models:/{name}/{version}", alias)


@contextmanager
def _registering(run_dir: Path) -> Iterator[None]:
    """Let one process at a time register a run, so that the next one finds its version."""
    try:
        with held_lock(run_dir / REGISTERING_LOCK, PATIENCE_S):
            yield
    except Timeout as error:
        raise TrackingError(f"{run_dir}: another process is registering it; try again later") from error


def registered_version(store: Store, name: str, run_id: str, loaded: LoadedModel) -> str:
    """Return the version of a registered model that already holds this model of a run; empty if there is none.

    Raises:
        TrackingError: the store cannot be reached.
    """
    keys = ("step", "selected_by")
    model = [str(loaded.info.get(key, "")) for key in keys]
    with tracking_errors(store.uri):
        for version in versions_of(store, name):
            if version.run_id == run_id and [version.tags.get(key, "") for key in keys] == model:
                return str(version.version)
    return ""


def _create_version(
    store: Store, name: str, run_id: str, loaded: LoadedModel, tags: dict[str, str], run_dir: Path
) -> str:
    """Log the model in the run, and create a version of the registered model from it; return its number."""
    source, model_id = _log_model(store, run_id, name, loaded, tags, run_dir)
    with ignored("RESOURCE_ALREADY_EXISTS"):
        store.client.create_registered_model(name)
    # The version is ready at once; without the 0, MLflow prints on stderr that it waits.
    options = {"run_id": run_id, "model_id": model_id, "tags": tags, "await_creation_for": 0}
    created = str(store.client.create_model_version(name, source, **options).version)
    # If the answer was lost or late, MLflow's HTTP client has repeated the request, and there are two versions.
    for version in versions_of(store, name):
        if version.source == source and str(version.version) != created:
            store.client.delete_model_version(name, version.version)
    return created


def check_model_name(name: str) -> str:
    """Return the name of a registered model if a reference such as `models:/NAME@ALIAS` can contain it.

    Raises:
        DataError: it is empty, or MLflow or a reference cannot take it.
    """
    if not name:
        raise DataError("no name for the registered model: set tracking.register_as, or give --name")
    try:
        return check_model(name)
    except ValueError as error:
        raise DataError(str(error)) from error


def check_alias_name(alias: str) -> str:
    """Return an alias if MLflow accepts it; empty: no alias.

    Raises:
        DataError: MLflow refuses it.
    """
    try:
        return alias and check_alias(alias)
    except ValueError as error:
        raise DataError(str(error)) from error


def _version_tags(
    loaded: LoadedModel, run_dir: Path, run_id: str, shot: int | None, results: Mapping[str, Any]
) -> dict[str, str]:
    """Return the tags of a version: settings, data, training and results of the model."""
    # The record says where the dataset was; the checkpoint does not.
    record = read_record(run_dir)
    tags = {
        "run_id": run_id,
        "settings_fingerprint": fingerprint(loaded.settings),
        "kind": _model_type(loaded),
        "method": loaded.settings.method.name if isinstance(loaded.model, MetaLearner) else "",
        "shot": "" if shot is None else str(shot),
        "data": redact(record.get("data") or ""),
        **flatten(loaded.info),
        **flatten({"results": results}),
    }
    return {key: value for key, value in tags.items() if value and len(value) < 5000}


def _log_model(
    store: Store, run_id: str, name: str, loaded: LoadedModel, tags: dict[str, str], run_dir: Path
) -> tuple[str, str]:
    """Log the model package as an MLflow model of the run; return its location and its ID.

    Code and weights are text and safetensors; nothing is pickled.
    """
    client = store.client
    experiment = client.get_run(run_id).info.experiment_id
    _delete_unregistered(store, experiment, run_id, name, tags)
    model = client.create_logged_model(experiment, name, run_id, tags, model_type=_model_type(loaded))
    try:
        with tempfile.TemporaryDirectory() as folder:
            package, logged = Path(folder) / "package", Path(folder) / "model"
            save_package(package, loaded)
            save_pyfunc(logged, package, loaded, model_id=model.model_id, run_id=run_id)
            client.log_model_artifacts(model.model_id, str(logged))
        log_scores(store, run_id, model.model_id, loaded, run_dir)
        client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    # Not `models:/m-…`, which MLflow 3.17 looks up in the default store of the process instead of this one.
    return model.artifact_location, model.model_id


def _delete_unregistered(store: Store, experiment: str, run_id: str, name: str, tags: Mapping[str, str]) -> None:
    """Delete the logged model of a registration that ended before its version was created.

    No other process registers this run now: see `_registering`.
    """
    client = store.client
    versions = paginate(client.search_model_versions, filter_string=f"run_id = '{run_id}'")
    sources = {version.source for version in versions}  # a search gives no model IDs
    started = paginate(
        client.search_logged_models, experiment_ids=[experiment], filter_string=f"source_run_id = '{run_id}'"
    )
    for left in list(started):
        same = left.name == name and all(left.tags.get(key) == value for key, value in tags.items())
        if left.artifact_location not in sources and (left.status != "READY" or same):
            client.delete_logged_model(left.model_id)


def _model_type(loaded: LoadedModel) -> str:
    return "few-shot classifier" if isinstance(loaded.model, MetaLearner) else "encoder"


def save_pyfunc(path: Path, package: Path, loaded: LoadedModel, **ids: str) -> None:
    """Write a model package as an MLflow model, which MLflow loads and serves.

    The package is copied into it. `ids` are `model_id` and `run_id` of a model that is logged in a run.
    """
    mlflow = import_mlflow()
    from metagmvae.infra.registry.pyfunc_model import PACKAGE, example_request, model_signature

    needed = (*REQUIREMENTS, "timm") if loaded.settings.model.encoder.startswith("timm:") else REQUIREMENTS
    with quiet_mlflow(), tempfile.TemporaryDirectory() as folder:
        wheel = write_wheel(Path(folder))
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(ENTRY),
            artifacts={PACKAGE: str(package)},
            signature=model_signature(loaded),
            input_example=example_request(loaded),
            # pip resolves the path from the folder of the model, where MLflow calls it.
            pip_requirements=[f"code/{wheel.name}" if wheel else "metagmvae", *map(_pinned, needed)],
            code_paths=[str(wheel)] if wheel else None,
            mlflow_model=mlflow.models.Model(**ids),
        )


def _pinned(name: str) -> str:
    """Return `name==version`; the bare name if the package is not installed but runs from a source tree."""
    version = installed_version(name)
    return f"{name}=={version}" if version else name


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Silence MLflow's report of each step of saving, and its complaint that a source tree is no installed package."""
    names = ("mlflow.pyfunc", "mlflow.utils.requirements_utils")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
