"""Evaluation of any model, an encoder alone with a head among them, on the same episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from metagmvae.evaluation.encoders.head_model import HeadModel, with_head
from metagmvae.evaluation.encoders.heads import DEFAULT_HEAD, HEADS, MODES, check_head
from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures, evaluate_baselines, evaluate_tuned
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, Tuning, evaluate_features
from metagmvae.evaluation.fewshot.evaluate_tasks import TASK_DEFAULTS, check_task, evaluate_tasks
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import FittedHead, HeadSettings
from metagmvae.training.trainer.package import LoadedModel


def evaluate_model(
    loaded: LoadedModel,
    dataset: Dataset,
    tasks: Sequence[Mapping[str, Any]],
    *,
    split: str = "test",
    mode: PredictionMode = "transductive",
    head: str | None = None,
    baselines: bool = False,
    name: str | None = None,
    progress: ProgressBar = no_progress,
) -> list[EpisodeResults]:
    """Evaluate a Meta-GMVAE (`evaluate_tasks`), or an encoder alone with a head, on the same episodes.

    Args:
        loaded, dataset, tasks, split, baselines, name, progress: as in `evaluate_tasks`.
        mode: of a Meta-GMVAE. A head has its own, `MODES`; one that classifies queries together refuses `inductive`.
        head: a key of `HEADS`, for an encoder alone; None: `nearest-mean`.

    Returns:
        The result of each task. That of an encoder names its head, and the settings of the head in `tuning`.

    Raises:
        DataError: as in `evaluate_tasks`, `head` is given for a Meta-GMVAE, or does not suit the mode.
    """
    name = name or loaded.settings.name
    if isinstance(loaded.model, MetaLearner):
        if head is not None:
            raise DataError(f"--head {head}: is for an encoder alone, and {name} is not one; omit it")
        return evaluate_tasks(
            loaded, dataset, tasks, split=split, mode=mode, baselines=baselines, name=name, progress=progress
        )
    head = check_head(head or DEFAULT_HEAD, mode)
    options: Any = {"split": split, "baselines": baselines, "name": name, "progress": progress}
    return evaluate_heads(loaded, dataset, tasks, [head], **options)[head]


def evaluate_heads(
    loaded: LoadedModel,
    dataset: Dataset,
    tasks: Sequence[Mapping[str, Any]],
    heads: Sequence[str],
    *,
    split: str = "test",
    baselines: bool = False,
    name: str | None = None,
    progress: ProgressBar = no_progress,
) -> dict[str, list[EpisodeResults]]:
    """Evaluate an encoder alone with several heads, keys of `HEADS`; its images are encoded once.

    Other arguments and errors are those of `evaluate_model`, whose results it returns for each head.
    """
    name = name or loaded.settings.name
    labels = dataset.episode_labels(split)
    full_tasks: list[dict[str, Any]] = [TASK_DEFAULTS | dict(task) for task in tasks]
    for task in full_tasks:  # before the images are encoded, which takes long
        check_task(labels, task)
    features = _features(loaded.model, dataset, split, name)
    validation = None
    validation_split = loaded.settings.data.validation_split
    if validation_split in dataset.splits and (baselines or any(HEADS[head].grid for head in heads)):
        validation = features if validation_split == split else _features(loaded.model, dataset, validation_split, name)
    results: dict[str, list[EpisodeResults]] = {head: [] for head in heads}
    for head, task in product(heads, full_tasks):
        title = f"{task['way']}-way {task['shot']}-shot"
        result = evaluate_tuned(HEADS[head], features, validation, task)
        if not HEADS[head].grid:
            result = replace(result, tuning=Tuning({}))
        result = _with_reliability(replace(result, head=head), with_head(loaded, head), features, task)
        if baselines:
            with progress(f"{title} baselines") as on_progress:
                result = replace(result, baselines=evaluate_baselines(features, validation, task, on_progress))
        results[head].append(result)
    return results


def _with_reliability(
    result: EpisodeResults, loaded: LoadedModel, features: SplitFeatures, task: Mapping[str, Any]
) -> EpisodeResults:
    """Add the calibration of the probabilities of the head, which are calibrated if the encoder was with this head."""
    assert isinstance(loaded.model, HeadModel)
    assert result.tuning is not None
    mode, adapt, way, shot = MODES[result.head], loaded.settings.adapt, task["way"], task["shot"]
    chosen = HeadSettings(way=way, shot=shot, settings=dict(result.tuning.settings))
    model = HeadModel(loaded.model, FittedHead(name=result.head, tasks=(chosen,)))
    calibration = loaded.calibration_map(adapt, mode, way, shot)
    options: dict[str, Any] = {"mode": mode, "calibration": calibration}
    measured = evaluate_features(model, adapt, features.by_kind["scaled"], features.labels, **options, **task)
    return replace(
        result, reliability=measured.reliability, calibration=calibration, uncalibrated=measured.uncalibrated
    )


def _features(model: EncoderModel, dataset: Dataset, split: str, name: str) -> SplitFeatures:
    """Encode a split."""
    device = default_device()
    h_nF = encode_split(model.to(device), dataset, split, device)
    if not torch.isfinite(h_nF).all():
        raise DataError(f"{name}: its encoder gives features that are not finite; use other weights")
    return SplitFeatures(split, dataset.episode_labels(split), {"scaled": h_nF})


def head_records(loaded: LoadedModel, results: Sequence[EpisodeResults]) -> dict[str, Any]:
    """Return `heads`: encoder, head and its settings for each task, and how they were chosen.

    Empty for a Meta-GMVAE.
    """
    rows = []
    for result in results:
        if result.head and result.tuning is not None:
            names = {"encoder": loaded.settings.model.encoder, "head": result.head}
            rows.append(names | {"way": result.way, "shot": result.shot} | result.tuning.summary())
    return {"heads": rows} if rows else {}
