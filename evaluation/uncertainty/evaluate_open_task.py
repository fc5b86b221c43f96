"""Queries of no labelled class in the episodes of a loaded model: both modes, and the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from metagmvae.evaluation.encoders.head_model import WITHOUT_BACKGROUND, HeadModel, with_head
from metagmvae.evaluation.fewshot.evaluate_tasks import check_task, model_inputs, split_features
from metagmvae.evaluation.uncertainty.fit_calibration import CalibrationPlan, fit_calibration
from metagmvae.evaluation.uncertainty.open_queries import OpenResults, evaluate_open, evaluate_open_baselines
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.models.posterior_calibration import FittedBackground
from metagmvae.training.trainer.package import LoadedModel, require_learner


def evaluate_open_task(
    loaded: LoadedModel,
    dataset: Dataset,
    task: Mapping[str, Any],
    *,
    split: str = "test",
    head: str | None = None,
    baselines: bool = False,
    name: str | None = None,
    progress: ProgressBar = no_progress,
) -> list[OpenResults]:
    """Evaluate a model on episodes in which some queries are of no labelled class.

    Args:
        loaded: a Meta-GMVAE with a background level (`metagmvae calibrate`), or an encoder alone. The settings and the
            level of the head of an encoder that has no level are chosen on the validation classes of the dataset.
        dataset, split, name, progress: as in `evaluate_tasks`.
        task: `way`, `shot`, `query`, `episodes`, `seed`, `open_classes`, and, if wanted, `unbalanced` or `dirichlet`,
            and `mix_groups`.
        head: as in `with_head`.
        baselines: also evaluate the baselines, with settings and threshold chosen on validation classes.

    Returns:
        The model in transductive and inductive mode, or a head in its own, each with and without its background
        component; then the baselines.

    Raises:
        DataError: the model has no background level, or its head has no such component; the data does not fit the task
            or the model; or there are no validation classes to choose the level of a head or the baselines on.
    """
    name = name or loaded.settings.name
    device, adapt = default_device(), loaded.settings.adapt
    labels = dataset.episode_labels(split)
    check_task(labels, task)
    loaded = _with_fitted_head(with_head(loaded, head, name), dataset, task, name, progress)
    model = require_learner(loaded, name).to(device)
    backgrounds = {mode: require_background(loaded, mode, task["way"], task["shot"], name) for mode in model.modes}
    validation_split = loaded.settings.data.validation_split
    if baselines and validation_split not in dataset.splits:
        raise DataError(f"{dataset.uri}: has no split {validation_split!r} to choose the thresholds of baselines on")
    features = split_features(model, dataset, split, device)
    h_nF = model_inputs(model, dataset, features, device)
    results, shown, of_head = [], loaded.settings.method.name, {}
    if isinstance(model, HeadModel):
        shown = f"{loaded.settings.model.encoder}, {model.head.name}"
        of_head = {"head": model.head.settings(task["way"], task["shot"])}  # its temperature is another one
    for mode, fitted in backgrounds.items():
        for background in (fitted, None):
            with progress(f"{mode} episodes") as on_progress:
                options: dict[str, Any] = {"mode": mode, "background": background, "on_progress": on_progress}
                result = evaluate_open(model, adapt, h_nF, labels, task, name=shown, **options)
            results.append(replace(result, settings={**result.settings, **of_head}))
    if baselines:
        validation = split_features(model, dataset, validation_split, device)
        with progress("baselines"):
            results += evaluate_open_baselines(features, validation, task)
    return results


def _with_fitted_head(
    loaded: LoadedModel, dataset: Dataset, task: Mapping[str, Any], name: str, progress: ProgressBar
) -> LoadedModel:
    """Return a model with the background level of its head for a task; a model without a head as it is.

    A head that was not calibrated with a level is calibrated on the validation classes.
    """
    model = loaded.model
    if not isinstance(model, HeadModel):
        return loaded
    if not model.has_background:
        raise DataError(
            f"--open: the head {WITHOUT_BACKGROUND} gives every query to one of the labelled classes; choose another "
            "--head"
        )
    if loaded.calibration is not None and loaded.calibration.backgrounds:
        return loaded
    way, split = task["way"], loaded.settings.data.validation_split
    classes = len(set(dataset.labels(split).tolist())) if split in dataset.splits else 0
    if classes <= way:
        raise DataError(
            f"--open: the level for queries of no labelled class is chosen on more than {way} validation classes, and "
            f"{dataset.uri} has {classes} in {split!r}; lower --way, or calibrate the encoder on other data: metagmvae "
            "calibrate MODEL --data URI --head HEAD"
        )
    plan = CalibrationPlan((way,), (task["shot"],), task["query"])
    record = fit_calibration(loaded, dataset, plan, device=default_device(), split=split, progress=progress)
    assert record.head is not None
    return replace(loaded, model=HeadModel(model, record.head), calibration=record)


def require_background(loaded: LoadedModel, mode: str, way: int, shot: float, name: object) -> FittedBackground:
    """Return the background level of a model for a task.

    Raises:
        DataError: the method has no such component, or no level for its settings of EM.
    """
    if isinstance(loaded.model, MetaLearner) and not loaded.model.has_background:
        raise DataError(
            f"{name}: the method {loaded.settings.method.name} has no component for queries of no labelled class; use "
            "a Meta-GMVAE, or an encoder alone with a head"
        )
    calibration = loaded.calibration
    fit = None if calibration is None else calibration.background(loaded.settings.adapt, mode, way, shot)
    if fit is None:
        raise DataError(
            f"{name}: has no level for queries of no labelled class with these settings of adapt; fit it first: "
            "metagmvae calibrate MODEL --data URI"
        )
    return fit
