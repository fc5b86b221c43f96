"""Accuracy without labels: on episodes in which each image is a class, and its random views are the images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures, baselines_summary, evaluate_baselines
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, evaluate_features
from metagmvae.evaluation.uncertainty.augmented_classes import augmented_features
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.trainer.package import LoadedModel, require_learner

TASKS: tuple[dict[str, Any], ...] = ({"way": 5, "shot": 1, "query": 15}, {"way": 5, "shot": 5, "query": 15})
"""Images of an episode, views of each with labels, and further views."""
SEED = 1_000
"""Of images and views. The calibration is fitted on others: its seed is 1."""


@torch.inference_mode()
def evaluate_augmented(loaded: LoadedModel, dataset: Dataset, split: str, episodes: int) -> list[EpisodeResults]:
    """Evaluate a model and the baselines on episodes of augmented images; one result for each of `TASKS`.

    This says whether the model recognises an image in its random views, which are those of the contrastive
    pre-training. It is no estimate of the accuracy on classes. The settings of the baselines are the defaults.

    Raises:
        DataError: the dataset contains features, or too few images.
    """
    device = default_device()
    model, adapt = require_learner(loaded, loaded.settings.name).to(device), loaded.settings.adapt
    views = max(task["shot"] + task["query"] for task in TASKS)
    h_nF, labels = augmented_features(loaded, dataset, split, views=views, seed=SEED, device=device)
    features, results = SplitFeatures(split, labels, {"scaled": h_nF}), []
    for task in (task | {"episodes": episodes, "seed": 0} for task in TASKS):
        calibration = loaded.calibration_map(adapt, "transductive", task["way"], task["shot"])
        result = evaluate_features(model, adapt, h_nF, labels, calibration=calibration, **task)
        results.append(replace(result, baselines=evaluate_baselines(features, None, task)))
    return results


def result_record(result: EpisodeResults) -> dict[str, Any]:
    """Return a result as plain values, with the keys of `metagmvae evaluate --record`."""
    reliability = {"reliability": result.reliability.summary()["bins"]} if result.reliability is not None else {}
    return result.summary() | baselines_summary([result]) | reliability
