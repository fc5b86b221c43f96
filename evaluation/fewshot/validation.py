"""Validation during training, on validation classes: episodes for all models, probes for encoder-only models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.baselines import evaluate_encoder
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_features
from metagmvae.evaluation.fewshot.probes import knn_probe, linear_probe
from metagmvae.pipelines.grouped_labels import EpisodeLabels, class_ids
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_learner import MetaLearner


def validate(
    model: EncoderModel, settings: Settings, h_nF: Tensor, labels: EpisodeLabels
) -> Mapping[str, Mapping[str, float]]:
    """Return `accuracy` and `ci95` (fractions in [0, 1]) by task: `5w1s` is 5-way 1-shot.

    A Meta-GMVAE classifies with its mixture, transductively. An encoder-only model is evaluated by the nearest class
    mean, inductively, and by two probes without an interval: `neighbours` and `linear`.

    `model` is in evaluation mode; of the settings, `validation` and `adapt` are read.
    """
    validation = settings.validation
    scores: dict[str, Mapping[str, float]] = {}
    for shot in validation.shots:
        keys = ("way", "query", "episodes", "seed", "mix_groups")
        task = {key: getattr(validation, key) for key in keys} | {"shot": shot}
        if isinstance(model, MetaLearner):
            result = evaluate_features(model, settings.adapt, h_nF, labels, **task)
        else:
            result = evaluate_encoder(h_nF, labels, **task)
        scores[f"{validation.way}w{shot}s"] = {"accuracy": result.mean} | (
            {} if result.ci95 is None else {"ci95": result.ci95}
        )
    if validation.probes and not isinstance(model, MetaLearner):
        probed = class_ids(labels) if validation.mix_groups else labels
        scores["neighbours"] = {"accuracy": knn_probe(h_nF, probed)}
        scores["linear"] = {"accuracy": linear_probe(h_nF, probed)}
    return scores
