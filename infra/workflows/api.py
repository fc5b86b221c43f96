"""Training and loading of models from Python: part of the public API (`import metagmvae`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metagmvae.configs.load import load_settings
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.training.trainer.package import LoadedModel


def train(config: str | Path, overrides: Mapping[str, Any] | None = None, *, resume: bool = False) -> Path:
    """Train a Meta-GMVAE as `metagmvae train` does; return the run folder.

    The run is tracked in MLflow and the model is registered if the settings say so (`tracking.enabled` and
    `tracking.register_as`).

    >>> import metagmvae
    >>> run = metagmvae.train(
    ...     "glyphs-demo",
    ...     {
    ...         "data.uri": "data/glyphs",  # written by: metagmvae prepare glyphs --out data/glyphs
    ...         "run.out": "runs/first",
    ...         "run.engine": "local",
    ...         "pretrain.steps": 2,
    ...         "train.steps": 2,
    ...         "tracking.enabled": False,
    ...     },
    ... )
    >>> (run / "checkpoint.pt").exists()
    True

    Args:
        config: path of a TOML file, or the name of a preset.
        overrides: values by dotted key (`section.key`); they replace those of the file.
        resume: continue from the checkpoint in the run folder (`run.out`), if it has one.

    Raises:
        SettingsError: a key or value is wrong, cannot be used on this machine, or differs from the run to resume.
        DataError: the data set or the run folder cannot be used.
        NonFiniteLossError: a step had a loss that is not finite; the last checkpoint is kept.
    """
    # Imported here, because it imports matplotlib, which load_model does not need.
    from metagmvae.infra.workflows.run_training import run_training

    # Values of TOML (strings, numbers, booleans and arrays of them) have the same form in JSON.
    as_text = [f"{key}={json.dumps(value, default=str)}" for key, value in (overrides or {}).items()]
    settings = load_settings(config, as_text)
    run_dir = run_training(settings, resume=resume)
    if settings.tracking.enabled and settings.tracking.register_as:
        from metagmvae.infra.registry.register import register

        register(run_dir, settings.tracking)
    return run_dir


def load_model(reference: str | Path, *, shot: int | None = None) -> LoadedModel:
    """Load a trained model, from disk or from the MLflow registry.

    >>> import metagmvae
    >>> loaded = metagmvae.load_model("runs/glyphs")         # or "models:/glyphs@champion"
    >>> loaded.image_shape
    (1, 28, 28)
    >>> loaded.model.training
    False

    Args:
        reference: path of a run folder, a checkpoint or a model package; or `models:/name@alias`, `models:/name/3` or
            `runs:/id` of the MLflow store in MLFLOW_TRACKING_URI, by default `runs/mlflow`.
        shot: selects the best model for this number of shots, if the run keeps one per shot
            (`train.selection = "best"`).

    Returns:
        The model (`model`, a torch module in evaluation mode on the CPU), its `settings`, its `image_shape` and the
        `preprocessing` of its training images.

    Raises:
        DataError: there is no such model, or it is damaged.
        TrackingError: the MLflow store cannot be reached.
    """
    return resolve_model(reference, shot=shot)
