"""What a result stands beside, on the very same features and episodes.

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
from metagmvae.evaluation.fewshot.predict import Mode
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised

Guess = Callable[[Tensor, Tensor], Tensor]
"""Support (K, S, F) and queries (P, F) of an episode -> class of each query, (P,)."""


def nearest_class_mean(x_nF: Tensor, labels: np.ndarray, **task: Any) -> EpisodeResults:
    """Each query goes to the class whose mean support vector is nearest (cosine); every query by itself.

    Args:
        x_nF: one vector per row: pixels or features, any length.
        labels: class ids, (n,).
        task: way, shot, query, episodes and seed as in `evaluate_features`, whose episodes these are.
    """
    return _evaluate(_nearest_mean, "inductive", x_nF, labels, **task)


def soft_k_means(
    x_nF: Tensor, labels: np.ndarray, *, temperature: float = 20.0, iterations: int = 10, **task: Any
) -> EpisodeResults:
    """Class means refined by soft assignments of the queries (Ren et al., ICLR 2018), all queries together.

    On features centred on the episode's mean and normalised; assignments are the softmax of
    `temperature` times the cosine to each mean. The rest as in `nearest_class_mean`.
    """

    def guess(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        return refined_posterior(support_KSF, query_PF, temperature, iterations).argmax(dim=1)

    return _evaluate(guess, "transductive", x_nF, labels, **task)


def logistic_regression(x_nF: Tensor, labels: np.ndarray, *, strength: float = 1.0, **task: Any) -> EpisodeResults:
    """scikit-learn's logistic regression on the normalised support (the paper's "LR"); every query by itself.

    Args:
        strength: C, the inverse of the L2 penalty; the rest as in `nearest_class_mean`.
    """

    def guess(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        K, S, _ = support_KSF.shape
        model = LogisticRegression(C=strength, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)  # a baseline that was cut short is none
            model.fit(F.normalize(support_KSF.flatten(0, 1), dim=1).numpy(), np.repeat(np.arange(K), S))
        return torch.as_tensor(model.predict(F.normalize(query_PF, dim=1).numpy()))

    return _evaluate(guess, "inductive", x_nF, labels, **task)


def plain_em(
    e_step: Literal["identity", "diagonal"], x_nF: Tensor, labels: np.ndarray, *, iterations: int = 10, **task: Any
) -> EpisodeResults:
    """The model's semi-supervised EM (Eq. 10 and 11) on the features themselves: no posterior, no latents, no training.

    Args:
        e_step: covariance, in the E-steps and in the final posterior.
        iterations: of EM; the rest as in `nearest_class_mean`, all queries together.
    """

    def guess(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
        unlabelled_1PF = query_PF[None]
        mixture = fit_semi_supervised(support_KSF[None], unlabelled_1PF, iterations=iterations, e_step=e_step)
        return class_log_posterior(mixture, unlabelled_1PF, e_step)[0].argmax(dim=1)

    return _evaluate(guess, "transductive", x_nF, labels, **task)


def refined_posterior(support_KSF: Tensor, query_PF: Tensor, temperature: float, iterations: int) -> Tensor:
    """Soft assignments of the queries after so many refinements of the class means: (P, K)."""
    centre_F = torch.cat([support_KSF.flatten(0, 1), query_PF]).mean(dim=0)
    support_KSF, query_PF = (F.normalize(x - centre_F, dim=-1) for x in (support_KSF, query_PF))
    mean_KF = support_KSF.mean(dim=1)
    for _ in range(iterations):
        soft_PK = torch.softmax(temperature * query_PF @ F.normalize(mean_KF, dim=1).T, dim=1)
        total_KF = support_KSF.sum(dim=1) + soft_PK.T @ query_PF
        mean_KF = total_KF / (support_KSF.shape[1] + soft_PK.sum(dim=0)[:, None])
    return torch.softmax(temperature * query_PF @ F.normalize(mean_KF, dim=1).T, dim=1)


def _nearest_mean(support_KSF: Tensor, query_PF: Tensor) -> Tensor:
    means_KF = F.normalize(F.normalize(support_KSF, dim=2).mean(dim=1), dim=1)
    return (F.normalize(query_PF, dim=1) @ means_KF.T).argmax(dim=1)


@torch.inference_mode()
def _evaluate(
    guess: Guess,
    mode: Mode,
    x_nF: Tensor,
    labels: np.ndarray,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
) -> EpisodeResults:
    sampler = EpisodeSampler(labels, way=way, shot=shot, query=query, seed=seed)
    x_nF = x_nF.float().cpu()
    truth_P = torch.arange(way).repeat_interleave(query)
    accuracies = []
    since = time.perf_counter()
    for index in range(episodes):
        episode = sampler.episode(index)
        support_KSF = x_nF[torch.as_tensor(episode.support)]
        guess_P = guess(support_KSF, x_nF[torch.as_tensor(episode.query.reshape(-1))])
        accuracies.append(float((guess_P == truth_P).double().mean()))
    return EpisodeResults(way, shot, query, seed, mode, np.array(accuracies), time.perf_counter() - since)


BASELINES: dict[str, Callable[..., EpisodeResults]] = {
    "nearest class mean": nearest_class_mean,
    "logistic regression": logistic_regression,
    "soft k-means": soft_k_means,
    "EM on features, identity": partial(plain_em, "identity"),
    "EM on features, diagonal": partial(plain_em, "diagonal"),
}
"""By the name that tables show."""
UNSCALED = ("nearest class mean", "logistic regression")
"""Those that are also shown on features as the encoder gives them, where a model brings them to a scale of its own."""
