"""Judging during training, on validation classes: episodes for every model, probes for an encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_features
from metagmvae.evaluation.fewshot.probes import knn_probe, linear_probe
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_gmvae import MetaGMVAE


def validate(
    model: EncoderModel, settings: Settings, h_nF: Tensor, labels: np.ndarray
) -> Mapping[str, Mapping[str, float]]:
    """Accuracy and interval of each task, "5w1s" and so on.

    A Meta-GMVAE classifies by its mixture. An encoder is judged by the nearest class mean, every query by itself, and
    by two probes, which have no interval: "neighbours" and "linear".

    Args:
        model: in evaluation mode.
        settings: `validation` and `adapt`.
        h_nF: features of the validation images, (n, F).
        labels: their classes, (n,).
    """
    wanted = settings.validation
    scores: dict[str, Mapping[str, float]] = {}
    for shot in wanted.shots:
        task: dict[str, Any] = {"way": wanted.way, "shot": shot, "query": wanted.query, "seed": wanted.seed}
        if isinstance(model, MetaGMVAE):
            result = evaluate_features(model, settings.adapt, h_nF, labels, episodes=wanted.episodes, **task)
        else:
            centred = h_nF - h_nF.mean(dim=0)
            result = nearest_class_mean(centred, labels, episodes=wanted.episodes, **task)
        scores[f"{wanted.way}w{shot}s"] = {"accuracy": result.mean, "ci95": result.ci95}
    if wanted.probes and not isinstance(model, MetaGMVAE):
        scores["neighbours"] = {"accuracy": knn_probe(h_nF, labels)}
        scores["linear"] = {"accuracy": linear_probe(h_nF, labels)}
    return scores
