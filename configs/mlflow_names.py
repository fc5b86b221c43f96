"""Names in MLflow: of experiments, registered models and aliases, and the tracking URI, as MLflow accepts them.

They are checked when settings are made, so that nothing is refused after a training. Settings that are read back from
a run (`configs.load.settings_from_json`) are not checked again: an older version accepted other names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

DEFAULT_EXPERIMENT = "metagmvae"
STORED = {"stored": True}
"""Validation context of settings that are read back."""
MAX_EXPERIMENT, MAX_MODEL, MAX_ALIAS = 500, 240, 255
"""Longest names, in characters. Of a registered model MLflow stores 256; `-encoder` may be appended."""
DATA = "{data}"
"""Stands for the name of the dataset in the name of a registered model."""
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
"""Variable that makes MLflow open a folder as its store."""
HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?|\[[0-9a-fA-F:]+\](:\d+)?(/.*)?")


def check_experiment(name: str) -> str:
    """Return the name of an MLflow experiment.

    Raises:
        ValueError: it is empty, too long, or contains control characters.
    """
    if not name.strip():
        raise ValueError("an experiment needs a name that is not empty")
    if not name.isprintable() or len(name) > MAX_EXPERIMENT:
        raise ValueError(f"{name!r}: give at most {MAX_EXPERIMENT} printable characters")
    return name


def check_model(name: str) -> str:
    """Return the name of a registered model, if a reference such as `models:/NAME@ALIAS` can contain it.

    Raises:
        ValueError: it is empty, `.` or `..`, too long, or contains one of / : @ ' " or control characters.
    """
    if not name.strip() or name in (".", ".."):
        raise ValueError(f"{name!r}: not a name for a registered model")
    if re.search(r"[/:@'\"]", name) or not name.isprintable():
        raise ValueError(f"{name!r}: not a valid name for a registered model; omit / : @ and quotes")
    if len(name) > MAX_MODEL:
        raise ValueError(f"the name of a registered model has {len(name)} characters; give at most {MAX_MODEL}")
    return name


def model_name(template: str, data_uri: str, otherwise: str) -> str:
    """Replace `{data}` in the name of a registered model by the last part of a data URI, without the characters that
    such a name cannot contain; by `otherwise` if nothing is left."""
    printable = "".join(c for c in PurePosixPath(data_uri).name if c.isprintable())
    return template.replace(DATA, re.sub(r"[/:@'\"]+", "-", printable).strip(" .")[:MAX_MODEL] or otherwise)


def check_alias(name: str) -> str:
    """Return the alias of a version of a registered model.

    Raises:
        ValueError: MLflow refuses it: other characters than letters, digits, _ and -, or a reserved name.
    """
    if not re.fullmatch(rf"[\w-]{{1,{MAX_ALIAS}}}", name):
        raise ValueError(f"{name!r}: not a valid alias; give letters, digits, _ and - (at most {MAX_ALIAS})")
    if name.lower() == "latest" or re.fullmatch(r"[vV]\d+", name):
        raise ValueError(f"{name!r}: MLflow reserves this alias (latest, v1, v2, …); choose another one")
    return name


def check_tracking_uri(uri: str) -> str:
    """Return a tracking URI.

    Raises:
        ValueError: it is a host and port without `http://`, which MLflow takes for a folder; or a folder, which MLflow
            no longer opens unless the variable `MLFLOW_ALLOW_FILE_STORE` says so.
    """
    if HOST_AND_PORT.fullmatch(uri):
        raise ValueError(f"{uri!r}: MLflow takes this for a folder; for a server write http://{uri}")
    is_folder = uri.startswith("file:") or not (":" in uri or uri.startswith("databricks"))
    if is_folder and os.environ.get(FILE_STORE, "").lower() not in ("true", "1"):
        database = PurePosixPath(uri.removeprefix("file://").removeprefix("file:")) / "mlflow.db"
        raise ValueError(
            f"{uri!r}: MLflow no longer opens a folder; write sqlite:///{database}, or set {FILE_STORE}=true"
        )
    return uri


def default_experiment() -> str:
    """Return the experiment of MLFLOW_EXPERIMENT_NAME, else `metagmvae`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def _unless_stored(check: Callable[[str], str], *, optional: bool = True) -> AfterValidator:
    """Return a validator that skips settings read back and, if `optional`, empty strings."""

    def validate(value: str, info: ValidationInfo) -> str:
        if info.context == STORED or (optional and not value):
            return value
        return check(value)

    return AfterValidator(validate)


ExperimentName = Annotated[str, _unless_stored(check_experiment, optional=False)]
ModelName = Annotated[str, _unless_stored(check_model)]
Alias = Annotated[str, _unless_stored(check_alias)]
TrackingUri = Annotated[str, _unless_stored(check_tracking_uri)]
