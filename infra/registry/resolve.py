"""Loads a trained model by reference: from the registry, an MLflow run, or a path.

From MLflow only the model package (safetensors and JSON) is downloaded. The code that is logged beside it is for
MLflow's own loaders; it is not downloaded, and nothing is unpickled.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.configs.credentials import redact
from metagmvae.configs.schema import TrackingSettings
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.store import Store, connect, registered_models, versions_of
from metagmvae.infra.tracking.tracking_errors import ignored, tracking_errors
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.training.trainer.package import LoadedModel


FORMS = (
    "models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID, a package folder, a checkpoint, a run folder, timm:NAME "
    "or torchvision:NAME"
)


def resolve_model(
    ref: str | Path, shot: int | None = None, tracking_uri: str | None = None, **encoder: Any
) -> LoadedModel:
    """Load a model, or an encoder by name.

    Args:
        ref: `models:/name@alias`, `models:/name/3`, `runs:/id[/path]` (its checkpoint, or a package in it), or the
            path of a package folder, a checkpoint file or a run folder.
        shot: which best model, if a run has one for each shot; a registered version holds one model only.
        tracking_uri: MLflow store; None: MLFLOW_TRACKING_URI, else the default store of the settings.
        encoder: `weights`, `dataset` and `image_size` of an encoder by name, as in `named_encoder`.

    Raises:
        EncoderError: as in `named_encoder`.
        DataError: there is no such model (the message lists those that exist), or metagmvae did not create it.
        TrackingError: the store cannot be reached.
    """
    from metagmvae.evaluation.encoders.named_encoder import is_encoder_name, named_encoder
    from metagmvae.training.trainer.package import load_model

    if is_encoder_name(ref):
        return named_encoder(str(ref), **encoder)
    for option in ("weights", "image_size"):
        if encoder.get(option) is not None:
            given = f"--{option.replace('_', '-')} {encoder[option]}"
            raise DataError(f"{given}: only for an encoder by name, such as timm:resnet18, and not for {ref}; omit it")
    if str(ref).startswith(("models:", "runs:")):
        return load_from_store(connect(TrackingSettings(uri=tracking_uri or ""), create=False), str(ref), shot)
    if not Path(ref).exists():
        raise DataError(f"{ref}: no such model; give {FORMS}")
    return load_model(ref, shot=shot)


def load_from_store(store: Store, ref: str, shot: int | None = None) -> LoadedModel:
    """Load `models:/…` or `runs:/…` from an open store; see `resolve_model`."""
    from metagmvae.training.trainer.package import load_model

    with tempfile.TemporaryDirectory() as folder:
        with tracking_errors(store.uri):
            fetch = _fetch_version if ref.startswith("models:") else _fetch_from_run
            path = fetch(store, ref, folder)
        try:
            return load_model(path, shot=None if path.is_dir() else shot)
        except DataError as error:  # names the copy
            raise DataError(str(error).replace(str(path), ref)) from error


def find_version(store: Store, ref: str) -> Any:
    """Return MLflow's entry of `models:/name@alias` or `models:/name/3`.

    Raises:
        DataError: the reference has another form, or the name, alias or version does not exist.
    """
    match = re.fullmatch(r"models:/([^/@'\"]+)(?:@([^/]+)|/(\d+))", ref)
    if match is None:
        raise DataError(f"{ref}: not a model reference; give {FORMS}")
    name, alias, number = match.groups()
    with ignored("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        if alias:
            return store.client.get_model_version_by_alias(name, alias)
        return store.client.get_model_version(name, number)
    raise DataError(f"{ref}: {_unknown_version(store, name)}")


def _unknown_version(store: Store, name: str) -> str:
    models = registered_models(store)
    if name not in models:
        return unknown_name(store, name, models)
    versions = sorted(int(entry.version) for entry in versions_of(store, name))
    aliases = ", ".join(f"{alias} -> {v}" for alias, v in sorted(models[name].aliases.items())) or "none"
    return f"no such version; versions of {name}: {', '.join(map(str, versions)) or 'none'}; aliases: {aliases}"


def unknown_name(store: Store, name: str, known: Iterable[str]) -> str:
    """Return the message for a registered model that does not exist."""
    return f"no registered model {name!r} in {redact(store.uri)}; it has: {', '.join(sorted(known)) or 'none'}"


def _fetch_version(store: Store, ref: str, folder: str) -> Path:
    version = find_version(store, ref)
    root = store.client.get_model_version_download_uri(version.name, version.version)
    return _fetch_package(store, f"{root}/artifacts/package", folder, ref, root)


def _fetch_from_run(store: Store, ref: str, folder: str) -> Path:
    from metagmvae.training.models.posterior_calibration import CALIBRATION
    from metagmvae.training.trainer.checkpoint import CHECKPOINT

    match = re.fullmatch(r"runs:/([0-9A-Za-z_-]+)(?:/(.+))?", ref)
    if match is None:
        raise DataError(f"{ref}: not a model reference; give {FORMS}")
    run_id, path = match.groups()
    root = None
    with ignored("RESOURCE_DOES_NOT_EXIST"):
        root = store.client.get_run(run_id).info.artifact_uri
    if root is None:
        raise DataError(f"{ref}: no such run in {redact(store.uri)}")
    path = path or CHECKPOINT
    if not path.endswith(".pt"):
        return _fetch_package(store, f"{root}/{path}", folder, ref, root)
    parent = path.rpartition("/")[0]
    around = f"{root}/{parent}" if parent else root
    names = file_names(store, around)
    if path.rpartition("/")[2] not in names:
        raise DataError(f"{ref}: no {path} in that run; it has: {', '.join(names) or 'nothing'}")
    if CALIBRATION in names:
        download(store, f"{around}/{CALIBRATION}", folder)
    return download(store, f"{root}/{path}", folder)


def _fetch_package(store: Store, uri: str, folder: str, ref: str, root: str) -> Path:
    """Download the two files of a model package, after checking that the folder has them."""
    names = file_names(store, uri)
    missing = {"model.json", "model.safetensors"} - set(names)
    if len(missing) == 1:
        raise DataError(
            f"{ref}: {redact(uri)} has lost {missing.pop()}: restore it, or register the run again; an alias of "
            "this version can be deleted in MLflow, and the next promotion then needs no comparison with it"
        )
    if missing:
        present = ", ".join(names or file_names(store, root)) or "nothing"
        raise DataError(f"{ref}: not a model that metagmvae registered (no safetensors package; it has: {present})")
    target = Path(folder) / "package"
    target.mkdir()
    for name in ("model.json", "model.safetensors"):
        download(store, f"{uri}/{name}", str(target))
    return target


def file_names(store: Store, uri: str) -> list[str]:
    """Return the names of what lies in a folder of MLflow, sorted."""
    listed = import_mlflow().artifacts.list_artifacts(artifact_uri=uri, tracking_uri=store.uri)
    return sorted(item.path.rpartition("/")[2] for item in listed)


def download(store: Store, uri: str, folder: str) -> Path:
    """Download a file of MLflow into a folder; return its path."""
    artifacts = import_mlflow().artifacts
    return Path(artifacts.download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=store.uri))
