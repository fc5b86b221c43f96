"""Few-shot accuracy of a loaded model on a data set: part of the public Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures, evaluate_baselines
from metagmvae.evaluation.fewshot.encoding import FEATURE_ROWS, encode_split, scale_features
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, evaluate_features
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.trainer.package import LoadedModel, require_learner

MAX_EPISODES = 10**7
TASK_DEFAULTS = {"query": 15, "episodes": 1000, "seed": 0}


def evaluate_tasks(
    loaded: LoadedModel,
    dataset: Dataset,
    tasks: Sequence[Mapping[str, Any]] = ({"way": 5, "shot": 1},),
    *,
    split: str = "test",
    mode: PredictionMode = "transductive",
    baselines: bool = False,
    name: str | None = None,
    progress: ProgressBar = no_progress,
) -> list[EpisodeResults]:
    """Evaluate a model on seeded few-shot episodes of a data set; the result of each task, in order.

    The images of the split are encoded once for all tasks, on a GPU if there is one. Equal tasks are equal episodes
    for every model, so that results can be compared in pairs (`evaluation.fewshot.paired`).

    >>> import metagmvae
    >>> model = metagmvae.load_model("runs/glyphs")
    >>> data = metagmvae.Dataset.open("data/glyphs")
    >>> tasks = [{"way": 5, "shot": 1, "episodes": 20}, {"way": 3, "shot": 5, "episodes": 20}]
    >>> for result in metagmvae.evaluate_tasks(model, data, tasks, baselines=True):
    ...     print(f"{result.way}-way {result.shot}-shot: {100 * result.mean:.2f} ± {100 * result.ci95:.2f} %")
    ...     print(f"nearest class mean: {100 * result.baselines['nearest class mean'].mean:.2f} %")
    5-way 1-shot: ... %
    nearest class mean: ... %
    3-way 5-shot: ... %
    nearest class mean: ... %

    Args:
        loaded: the model of a method, for example from `metagmvae.load_model`; it is moved to the device.
        dataset: images, or features made by the encoder of the model.
        tasks: mappings with `way`, `shot` and, if wanted, `query` (queries per class, 15), `episodes` (1,000),
            `seed` (0), `unbalanced` (False), `dirichlet` (None) and `mix_groups` (False), as in `evaluate_features`.
        split: whose classes the episodes are drawn from.
        mode: `transductive` or `inductive`, as in `MetaLearner.log_posteriors`.
        baselines: also evaluate the baselines on the same features and episodes, each in its own mode, with settings
            chosen on the validation classes of the dataset; they are in `baselines` of each result.
        name: of the model in error messages; None: its name in the settings.
        progress: opens a progress bar for each task.

    Raises:
        DataError: the model is encoder-only, another encoder made the features, the split has too few classes or
            images for a task, or the features are not finite.
    """
    name = name or loaded.settings.name
    device = default_device()
    model, labels = require_learner(loaded, name).to(device), dataset.episode_labels(split)
    full_tasks: list[dict[str, Any]] = [TASK_DEFAULTS | dict(task) for task in tasks]
    for task in full_tasks:  # before the images are encoded, which takes long
        check_task(labels, task)
    features = split_features(model, dataset, split, device, name)
    h_nF = model_inputs(model, dataset, features, device, name)
    validation = None
    validation_split = loaded.settings.data.validation_split
    if baselines and validation_split in dataset.splits:
        validation = features if validation_split == split else split_features(model, dataset, validation_split, device)
    results = []
    for task in full_tasks:
        title = f"{task['way']}-way {task['shot']}-shot"
        with progress(f"{title} episodes") as on_progress:
            adapt = loaded.settings.adapt
            calibration = loaded.calibration_map(adapt, mode, task["way"], task["shot"])
            options: dict[str, Any] = {"mode": mode, "calibration": calibration, "on_progress": on_progress}
            result = evaluate_features(model, adapt, h_nF, labels, **options, **task)
        if baselines:
            with progress(f"{title} baselines") as on_progress:
                result = replace(result, baselines=evaluate_baselines(features, validation, task, on_progress))
        results.append(result)
    return results


def check_task(labels: EpisodeLabels, task: Mapping[str, Any]) -> None:
    """Check the episodes of a task before the images are encoded, which takes long, and draw the first.

    Raises:
        DataError: the number of episodes is out of range, or the classes or groups do not suffice for the task.
    """
    if not 1 <= task["episodes"] <= MAX_EPISODES:
        raise DataError(f"episodes is {task['episodes']}; give a number from 1 to {MAX_EPISODES:,}")
    QuerySampler(labels, **{key: value for key, value in task.items() if key != "episodes"}).batch(0, 1)


def split_features(
    model: MetaLearner, dataset: Dataset, split: str, device: torch.device, name: object = "the model"
) -> SplitFeatures:
    """Encode a split once by the encoder of a model; the raw features are kept too if the model scales them.

    Raises:
        DataError: another encoder made the features of the dataset, or they are not finite.
    """
    raw_nF = encode_split(EncoderModel(model.encoder, model.image_shape), dataset, split, device)
    scale = getattr(model, "scale", torch.nn.Identity())
    with torch.inference_mode():
        by_kind = {"scaled": torch.cat([scale(h) for h in raw_nF.split(FEATURE_ROWS)])}
    _check_finite(by_kind["scaled"], name)
    if not isinstance(scale, torch.nn.Identity):
        by_kind["unscaled"] = raw_nF
    return SplitFeatures(split, dataset.episode_labels(split), by_kind)


def model_inputs(
    model: MetaLearner, dataset: Dataset, features: SplitFeatures, device: torch.device, name: object = "the model"
) -> Tensor:
    """Return what `model.encode_images` gives for the images of a split; by its features where these suffice.

    Raises:
        DataError: the method reads images and the dataset holds features; or they are not finite.
    """
    if not model.reads_features:
        h_nF = encode_split(model, dataset, features.split, device)
    else:
        h_nF = scale_features(model, features.by_kind.get("unscaled", features.by_kind["scaled"]))
    _check_finite(h_nF, name)
    return h_nF


def _check_finite(h_nF: Tensor, name: object) -> None:
    # The argmax of NaN is the first class, which would pass for a prediction.
    if not torch.isfinite(h_nF).all():
        raise DataError(f"{name}: its encoder gives features that are not finite; use another checkpoint")
