"""Simple classifiers that are evaluated on the same features and episodes as a model.

Notation: n images, E episodes, F features, K ways, S shots, P queries of an episode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.query_assignments import (
    laplacian_logits,
    optimal_transport_posterior,
    soft_k_means_cosines,
)
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.training.models.meta_learner import PredictionMode
from metagmvae.training.objectives.logistic_regression import logistic_regression_logits
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised

Classifier = Callable[[Tensor, Tensor], Tensor]
"""Support (E, K, S, F) and queries (E, P, F) of a batch of episodes -> class of each query, 0 to K - 1, (E, P)."""

VALUES_PER_BATCH = 2**21
"""Maximum number of feature values in a batch of episodes (8 MB): small batches fit the caches of a CPU."""


def nearest_class_mean(x_nF: Tensor, labels: np.ndarray, **task: Any) -> EpisodeResults:
    """Evaluate the nearest class mean: a query gets the class whose mean support vector has the largest cosine.

    Vectors are normalised before the mean is taken. Inductive: each query is classified alone.

    Args:
        x_nF: one vector per image: pixels or features.
        labels: their classes, (n,).
        task: way, shot, query, episodes and seed, as in `evaluate_features`, which draws the same episodes.

    Raises:
        DataError: the split has too few classes, or a class too few images, for the task.
    """

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        mean_EKF = F.normalize(F.normalize(support_EKSF, dim=3).mean(dim=2), dim=2)
        return (F.normalize(query_EPF, dim=2) @ mean_EKF.transpose(1, 2)).argmax(dim=2)

    return evaluate_batches(classify, "inductive", x_nF, labels, **task)


def evaluate_encoder(h_nF: Tensor, labels: np.ndarray, **task: Any) -> EpisodeResults:
    """Evaluate an encoder-only model: nearest class mean on features that are centred on the mean of the split.

    Arguments and errors are those of `nearest_class_mean`.
    """
    return nearest_class_mean(h_nF - h_nF.mean(dim=0), labels, **task)


def soft_k_means(
    x_nF: Tensor, labels: np.ndarray, *, temperature: float = 20.0, iterations: int = 10, **task: Any
) -> EpisodeResults:
    """Evaluate class means that are refined by soft assignments of all queries (Ren et al., ICLR 2018).

    Arguments and errors are those of `nearest_class_mean`, and two of `soft_k_means_cosines`. Transductive.
    """

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        return soft_k_means_cosines(support_EKSF, query_EPF, temperature, iterations).argmax(dim=2)

    return evaluate_batches(classify, "transductive", x_nF, labels, **task)


def optimal_transport(x_nF: Tensor, labels: np.ndarray, *, sharpness: float = 10.0, **task: Any) -> EpisodeResults:
    """Evaluate the assignment of all queries to moving prototypes with as many queries in each class. Transductive.

    Arguments and errors are those of `nearest_class_mean`, and one of `optimal_transport_posterior`.
    """

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        return optimal_transport_posterior(support_EKSF, query_EPF, sharpness).argmax(dim=2)

    return evaluate_batches(classify, "transductive", x_nF, labels, **task)


def laplacian(
    x_nF: Tensor, labels: np.ndarray, *, weight: float = 0.7, neighbours: int = 3, **task: Any
) -> EpisodeResults:
    """Evaluate the nearest class mean, made consistent among neighbouring queries (LaplacianShot). Transductive.

    Arguments and errors are those of `nearest_class_mean`, and two of `laplacian_logits`.
    """

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        return laplacian_logits(support_EKSF, query_EPF, weight, neighbours).argmax(dim=2)

    return evaluate_batches(classify, "transductive", x_nF, labels, **task)


def logistic_regression(x_nF: Tensor, labels: np.ndarray, *, strength: float = 1.0, **task: Any) -> EpisodeResults:
    """Evaluate logistic regression on the normalised support (the paper's "LR"), many episodes at a time. Inductive.

    Args:
        x_nF: as in `nearest_class_mean`.
        labels: as in `nearest_class_mean`.
        strength: C of scikit-learn, the inverse of the L2 penalty.
        task: as in `nearest_class_mean`.

    Raises:
        DataError: as in `nearest_class_mean`, or the fit of an episode did not converge.
    """

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        support_EKSF, query_EPF = F.normalize(support_EKSF, dim=3), F.normalize(query_EPF, dim=2)
        return logistic_regression_logits(support_EKSF, query_EPF, strength).argmax(dim=2)

    return evaluate_batches(classify, "inductive", x_nF, labels, **task)


def em_on_features(
    e_step: Literal["identity", "diagonal"],
    x_nF: Tensor,
    labels: np.ndarray,
    *,
    temperature: float = 1.0,
    iterations: int = 10,
    **task: Any,
) -> EpisodeResults:
    """Evaluate semi-supervised EM (Eq. 10 and 11) on the features themselves, without a trained model. Transductive.

    Args:
        e_step: covariance in the E-steps and in the final posterior.
        x_nF: as in `nearest_class_mean`.
        labels: as in `nearest_class_mean`.
        temperature: divides the log-likelihoods, as `adapt.temperature` does for a model.
        iterations: of EM.
        task: as in `nearest_class_mean`.
    """

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        mixture = fit_semi_supervised(
            support_EKSF, query_EPF, iterations=iterations, e_step=e_step, temperature=temperature
        )
        return class_log_posterior(mixture, query_EPF, e_step, temperature).argmax(dim=2)

    return evaluate_batches(classify, "transductive", x_nF, labels, **task)


@torch.inference_mode()
def evaluate_batches(
    classify: Classifier,
    mode: PredictionMode,
    x_nF: Tensor,
    labels: np.ndarray,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    unbalanced: bool = False,
    dirichlet: float | None = None,
) -> EpisodeResults:
    """Evaluate a classifier of batches of episodes, in float32, over the episodes of `evaluate_features`.

    Args:
        classify: predicts the queries of each episode; its classes are the rows of the support.
        mode: what the classifier is: `inductive` if it classifies each query alone, else `transductive`.
        x_nF: one vector per image, on any device; images, (n, C, H, W), become vectors of pixels.
        labels: their classes, (n,).
        way: classes per episode.
        shot: labelled images per class.
        query: queries per class.
        episodes: number of episodes.
        seed: of the draw of the episodes.
        unbalanced: as in `evaluate_features`.
        dirichlet: as in `evaluate_features`.

    Raises:
        DataError: the split has too few classes, or a class too few images, for the task.
    """
    task: dict[str, Any] = {"way": way, "shot": shot, "query": query, "seed": seed}
    sampler = QuerySampler(labels, **task, unbalanced=unbalanced, dirichlet=dirichlet)
    accuracies = []
    start = time.perf_counter()
    for support_EKSF, query_EPF, truth_EP in feature_batches(x_nF, sampler, episodes):
        predicted_EP = classify(support_EKSF, query_EPF)
        accuracies.append((predicted_EP == truth_EP.to(predicted_EP.device)).double().mean(dim=1).cpu())
    seconds = time.perf_counter() - start
    accuracies_E = torch.cat(accuracies).numpy()
    result = EpisodeResults(way, shot, query, seed, mode, accuracies_E, seconds)
    return replace(result, unbalanced=unbalanced, dirichlet=dirichlet, capped=sampler.capped)


def feature_batches(x_nF: Tensor, sampler: QuerySampler, episodes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield support (E, K, S, F), queries (E, P, F) and their classes (E, P) of many episodes at a time; float32."""
    x_nF = x_nF.flatten(1).float()
    points = sampler.episodes.way * sampler.episodes.shot + sampler.queries
    per_batch = max(1, VALUES_PER_BATCH // (points * x_nF.shape[1]))
    for first in range(0, episodes, per_batch):
        rows = sampler.batch(first, min(per_batch, episodes - first))
        support_EKS, query_EP, truth_EP = map(torch.as_tensor, rows)
        yield x_nF[support_EKS], x_nF[query_EP], truth_EP


BASELINES: dict[str, Callable[..., EpisodeResults]] = {
    "nearest class mean": nearest_class_mean,
    "logistic regression": logistic_regression,
    "soft k-means": soft_k_means,
    "optimal transport": optimal_transport,
    "Laplacian": laplacian,
    "EM on features, identity": partial(em_on_features, "identity"),
    "EM on features, diagonal": partial(em_on_features, "diagonal"),
}
"""Baselines by the name that tables show; `evaluate --baselines` runs all of them."""
