"""Accuracy without labels: on episodes in which each image is a class, and its random views are the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures, baselines_summary, evaluate_baselines
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, evaluate_features
from metagmvae.evaluation.uncertainty.augmented_classes import augmented_features
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.trainer.package import LoadedModel, require_learner

SEED = 1_000
"""Added to the seed of the episodes, so that the calibration is fitted on other images and views."""


@torch.inference_mode()
def evaluate_augmented(
    loaded: LoadedModel,
    dataset: Dataset,
    split: str,
    *,
    way: int = 5,
    shots: Sequence[int] = (1, 5),
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
) -> list[EpisodeResults]:
    """Evaluate a model and the baselines on episodes of augmented images; one result for each number of shots.

    This says whether the model recognises an image in its random views, which are those of the contrastive
    pre-training. It is no estimate of the accuracy on classes. The settings of the baselines are the defaults.

    Args:
        loaded: a Meta-GMVAE.
        dataset: images.
        split: whose images become classes.
        way: images of an episode.
        shots: views with labels.
        query: further views of each image.
        episodes: number of episodes.
        seed: of the images, the views and the episodes.

    Raises:
        DataError: the dataset contains features, or too few images.
    """
    device = default_device()
    model, adapt = require_learner(loaded, loaded.settings.name).to(device), loaded.settings.adapt
    views = max(shots) + query
    h_nF, labels = augmented_features(loaded, dataset, split, views=views, seed=seed + SEED, device=device)
    features, results = SplitFeatures(split, labels, {"scaled": h_nF}), []
    for shot in shots:
        task: dict[str, Any] = {"way": way, "shot": shot, "query": query, "episodes": episodes, "seed": seed}
        calibration = loaded.calibration_map(adapt, "transductive", way, shot)
        result = evaluate_features(model, adapt, h_nF, labels, calibration=calibration, **task)
        results.append(replace(result, baselines=evaluate_baselines(features, None, task)))
    return results


def result_record(result: EpisodeResults) -> dict[str, Any]:
    """Return a result as plain values, with the keys of `metagmvae evaluate --record`."""
    reliability = {"reliability": result.reliability.summary()["bins"]} if result.reliability is not None else {}
    return result.summary() | baselines_summary([result]) | reliability
