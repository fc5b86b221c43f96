"""Simple classifiers that are evaluated on the same features and episodes as a model.

Notation: n images, F features, K ways, S shots, P queries of an episode.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.predict import PredictionMode
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised

Classifier = Callable[[Tensor, Tensor], Tensor]
"""Support (K, S, F) and queries (P, F) of an episode -> predicted class of each query, 0 to K - 1, (P,)."""


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

    def classify(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        mean_KF = F.normalize(F.normalize(support_KSF, dim=2).mean(dim=1), dim=1)
        return (F.normalize(query_PF, dim=1) @ mean_KF.T).argmax(dim=1)

    return evaluate_classifier(classify, "inductive", x_nF, labels, **task)


def evaluate_encoder(h_nF: Tensor, labels: np.ndarray, **task: Any) -> EpisodeResults:
    """Evaluate an encoder-only model: nearest class mean on features that are centred on the mean of the split.

    Arguments and errors are those of `nearest_class_mean`.
    """
    return nearest_class_mean(h_nF - h_nF.mean(dim=0), labels, **task)


def soft_k_means(
    x_nF: Tensor, labels: np.ndarray, *, temperature: float = 20.0, iterations: int = 10, **task: Any
) -> EpisodeResults:
    """Evaluate class means that are refined by soft assignments of all queries (Ren et al., ICLR 2018).

    Arguments and errors are those of `nearest_class_mean`, and two of `soft_k_means_posterior`. Transductive.
    """

    def classify(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        return soft_k_means_posterior(support_KSF, query_PF, temperature, iterations).argmax(dim=1)

    return evaluate_classifier(classify, "transductive", x_nF, labels, **task)


def logistic_regression(x_nF: Tensor, labels: np.ndarray, *, strength: float = 1.0, **task: Any) -> EpisodeResults:
    """Evaluate scikit-learn's logistic regression on the normalised support (the paper's "LR"). Inductive.

    Args:
        x_nF: as in `nearest_class_mean`.
        labels: as in `nearest_class_mean`.
        strength: C of scikit-learn, the inverse of the L2 penalty.
        task: as in `nearest_class_mean`.

    Raises:
        DataError: as in `nearest_class_mean`.
        ConvergenceWarning: the fit of an episode did not converge.
    """

    def classify(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        K, S, _ = support_KSF.shape
        model = LogisticRegression(C=strength, max_iter=1000)
        with warnings.catch_warnings():
            # An unfinished fit would be a weaker baseline than the one that is named.
            warnings.simplefilter("error", ConvergenceWarning)
            model.fit(F.normalize(support_KSF.flatten(0, 1), dim=1).numpy(), np.repeat(np.arange(K), S))
        return torch.as_tensor(model.predict(F.normalize(query_PF, dim=1).numpy()))

    return evaluate_classifier(classify, "inductive", x_nF, labels, **task)


def em_on_features(
    e_step: Literal["identity", "diagonal"], x_nF: Tensor, labels: np.ndarray, *, iterations: int = 10, **task: Any
) -> EpisodeResults:
    """Evaluate semi-supervised EM (Eq. 10 and 11) on the features themselves, without a trained model. Transductive.

    Args:
        e_step: covariance in the E-steps and in the final posterior.
        x_nF: as in `nearest_class_mean`.
        labels: as in `nearest_class_mean`.
        iterations: of EM.
        task: as in `nearest_class_mean`.
    """

    def classify(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        query_1PF = query_PF[None]
        mixture = fit_semi_supervised(support_KSF[None], query_1PF, iterations=iterations, e_step=e_step)
        return class_log_posterior(mixture, query_1PF, e_step)[0].argmax(dim=1)

    return evaluate_classifier(classify, "transductive", x_nF, labels, **task)


def soft_k_means_posterior(support_KSF: Tensor, query_PF: Tensor, temperature: float, iterations: int) -> Tensor:
    """Return the soft assignments of the queries after the class means were refined: (P, K).

    Features are centred on the mean of the episode and normalised.

    Args:
        support_KSF: labelled vectors by class.
        query_PF: vectors of the queries.
        temperature: assignments are the softmax of `temperature` times the cosine to each class mean.
        iterations: number of refinements.
    """
    centre_F = torch.cat([support_KSF.flatten(0, 1), query_PF]).mean(dim=0)
    support_KSF, query_PF = (F.normalize(x - centre_F, dim=-1) for x in (support_KSF, query_PF))
    mean_KF = support_KSF.mean(dim=1)
    for _ in range(iterations):
        soft_PK = torch.softmax(temperature * query_PF @ F.normalize(mean_KF, dim=1).T, dim=1)
        total_KF = support_KSF.sum(dim=1) + soft_PK.T @ query_PF
        mean_KF = total_KF / (support_KSF.shape[1] + soft_PK.sum(dim=0)[:, None])
    return torch.softmax(temperature * query_PF @ F.normalize(mean_KF, dim=1).T, dim=1)


@torch.inference_mode()
def evaluate_classifier(
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
) -> EpisodeResults:
    """Evaluate a classifier of one episode, in float32 on the CPU, over the episodes of `evaluate_features`.

    Args:
        classify: predicts the queries of one episode; its classes are the rows of the support.
        mode: what the classifier is: `inductive` if it classifies each query alone, else `transductive`.
        x_nF: one vector per image.
        labels: their classes, (n,).
        way: classes per episode.
        shot: labelled images per class.
        query: queries per class.
        episodes: number of episodes.
        seed: of the draw of the episodes.

    Raises:
        DataError: the split has too few classes, or a class too few images, for the task.
    """
    sampler = EpisodeSampler(labels, way=way, shot=shot, query=query, seed=seed)
    x_nF = x_nF.float().cpu()
    truth_P = torch.arange(way).repeat_interleave(query)
    accuracies = []
    start = time.perf_counter()
    for index in range(episodes):
        episode = sampler.episode(index)
        support_KSF = x_nF[torch.as_tensor(episode.support)]
        predicted_P = classify(support_KSF, x_nF[torch.as_tensor(episode.query.reshape(-1))])
        accuracies.append(float((predicted_P == truth_P).double().mean()))
    return EpisodeResults(way, shot, query, seed, mode, np.array(accuracies), time.perf_counter() - start)


BASELINES: dict[str, Callable[..., EpisodeResults]] = {
    "nearest class mean": nearest_class_mean,
    "logistic regression": logistic_regression,
    "soft k-means": soft_k_means,
    "EM on features, identity": partial(em_on_features, "identity"),
    "EM on features, diagonal": partial(em_on_features, "diagonal"),
}
"""Baselines by the name that tables show; `evaluate --baselines` runs all of them."""
UNSCALED_BASELINES = ("nearest class mean", "logistic regression")
"""Baselines that are also run on the raw features of the encoder if the model scales its features."""
