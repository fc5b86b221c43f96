"""Simple classifiers that are evaluated on the same features and episodes as a model.

Notation: n images, E episodes, F features, K ways, S shots, P queries of an episode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.query_assignments import (
    laplacian_logits,
    optimal_transport_posterior,
    soft_k_means_cosines,
)
from metagmvae.pipelines.extensions import extension_names, load_extension
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.training.models.meta_learner import PredictionMode
from metagmvae.training.objectives.logistic_regression import logistic_regression_logits
from metagmvae.training.objectives.mixture import class_logits, fit_semi_supervised

VALUES_PER_BATCH = 2**21
"""Maximum number of feature values in a batch of episodes (8 MB): small batches fit the caches of a CPU."""


def nearest_class_mean_scores(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
    """Return the cosines of the queries to the class means, (E, P, K); vectors are normalised before the mean."""
    mean_EKF = F.normalize(F.normalize(support_EKSF, dim=3).mean(dim=2), dim=2)
    return F.normalize(query_EPF, dim=2) @ mean_EKF.transpose(1, 2)


def logistic_regression_scores(support_EKSF: Tensor, query_EPF: Tensor, strength: float = 1.0) -> Tensor:
    """Return the logits of logistic regression on the normalised support (the paper's "LR"), (E, P, K).

    `strength` is C of scikit-learn, the inverse of the L2 penalty.

    Raises:
        DataError: the fit of an episode did not converge.
    """
    support_EKSF, query_EPF = F.normalize(support_EKSF, dim=3), F.normalize(query_EPF, dim=2)
    return logistic_regression_logits(support_EKSF, query_EPF, strength)


def em_scores(
    support_EKSF: Tensor, query_EPF: Tensor, e_step: Literal["identity", "diagonal"], temperature: float = 1.0
) -> Tensor:
    """Return the class logits of semi-supervised EM (Eq. 10 and 11) on the features themselves, (E, P, K).

    `e_step` is the covariance in the E-steps and in the final posterior.
    """
    mixture = fit_semi_supervised(support_EKSF, query_EPF, iterations=10, e_step=e_step, temperature=temperature)
    return class_logits(mixture, query_EPF, e_step, temperature)


@dataclass(frozen=True)
class Baseline:
    """A classifier that gives each query the class of its highest score. Called, it is evaluated."""

    scores: Callable[..., Tensor]
    """Support (E, K, S, F), queries (E, P, F) and settings by name -> score of each class, (E, P, K)."""
    mode: PredictionMode
    """`inductive` if it classifies each query alone, else `transductive`."""
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Candidates of each setting, the default first; the evaluation chooses among them (`baseline_tuning`)."""

    def __call__(self, x_nF: Tensor, labels: EpisodeLabels, **task: Any) -> EpisodeResults:
        """Evaluate it as `evaluate_batches` does; keywords that it does not have are settings of the scores."""
        return evaluate_batches(self._classify, self.mode, x_nF, labels, **task)

    def _classify(self, support_EKSF: Tensor, query_EPF: Tensor, **settings: Any) -> Tensor:
        return self.scores(support_EKSF, query_EPF, **settings).argmax(dim=2)


nearest_class_mean = Baseline(nearest_class_mean_scores, "inductive")
logistic_regression = Baseline(logistic_regression_scores, "inductive", {"strength": (1.0, 0.1, 10.0, 100.0)})
soft_k_means = Baseline(soft_k_means_cosines, "transductive", {"temperature": (20.0, 5.0, 10.0, 40.0, 80.0)})
optimal_transport = Baseline(optimal_transport_posterior, "transductive", {"sharpness": (10.0, 5.0, 20.0, 40.0)})
laplacian = Baseline(laplacian_logits, "transductive", {"weight": (0.7, 0.1, 0.3, 1.0, 1.5), "neighbours": (3, 10)})
EM_GRID = {"temperature": (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)}
em = Baseline(em_scores, "transductive", {"e_step": ("identity", "diagonal"), **EM_GRID})
BASELINES: dict[str, Baseline] = {
    "nearest class mean": nearest_class_mean,
    "logistic regression": logistic_regression,
    "soft k-means": soft_k_means,
    "optimal transport": optimal_transport,
    "Laplacian": laplacian,
    "EM on features, identity": Baseline(partial(em_scores, e_step="identity"), "transductive", EM_GRID),
    "EM on features, diagonal": Baseline(partial(em_scores, e_step="diagonal"), "transductive", EM_GRID),
}
"""Baselines of this package by the name that tables show."""


def all_baselines() -> dict[str, Baseline]:
    """`BASELINES` and those that other packages add, by name; `evaluate --baselines` runs all of them.

    Raises:
        DataError: the package of one cannot be used, or a name occurs twice.
    """
    added = {name: load_extension("metagmvae.baselines", name) for name in extension_names("metagmvae.baselines")}
    for name, baseline in added.items():
        if not isinstance(baseline, Baseline):
            kind = type(baseline).__name__
            raise DataError(f"metagmvae.baselines: {name}: its package adds {kind} instead of a Baseline; update it")
        if name in BASELINES:
            raise DataError(f"metagmvae.baselines: {name}: is a baseline of metagmvae; give it another name")
    return BASELINES | added


def evaluate_encoder(h_nF: Tensor, labels: EpisodeLabels, **task: Any) -> EpisodeResults:
    """Evaluate an encoder-only model: nearest class mean on features that are centred on the mean of the split."""
    return nearest_class_mean(h_nF - h_nF.mean(dim=0), labels, **task)


@torch.inference_mode()
def evaluate_batches(
    classify: Callable[..., Tensor],
    mode: PredictionMode,
    x_nF: Tensor,
    labels: EpisodeLabels,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    unbalanced: bool = False,
    dirichlet: float | None = None,
    mix_groups: bool = False,
    **settings: Any,
) -> EpisodeResults:
    """Evaluate a classifier of batches of episodes, in float32, over the episodes of `evaluate_features`.

    Args:
        classify: support (E, K, S, F), queries (E, P, F) and `settings` -> class of each query, 0 to K - 1, (E, P).
        mode: what the classifier is: `inductive` if it classifies each query alone, else `transductive`.
        x_nF: one vector per image, on any device; images, (n, C, H, W), become vectors of pixels.
        settings: further arguments of `classify`.

    The others, and errors, are those of `evaluate_features`.
    """
    task: dict[str, Any] = {"way": way, "shot": shot, "query": query, "seed": seed}
    task |= {"unbalanced": unbalanced, "dirichlet": dirichlet}
    sampler = QuerySampler(labels, **task, mix_groups=mix_groups)
    accuracies = []
    start = time.perf_counter()
    for support_EKSF, query_EPF, truth_EP in feature_batches(x_nF, sampler, episodes):
        predicted_EP = classify(support_EKSF, query_EPF, **settings)
        accuracies.append((predicted_EP == truth_EP.to(predicted_EP.device)).double().mean(dim=1).cpu())
    seconds = time.perf_counter() - start
    accuracies_E, drawn = torch.cat(accuracies).numpy(), sampler.episodes
    about: dict[str, Any] = {"capped": sampler.capped, "groups": drawn.groups, "left_out": drawn.left_out}
    return EpisodeResults(**task, mode=mode, accuracies=accuracies_E, seconds=seconds, **about)


def feature_batches(x_nF: Tensor, sampler: QuerySampler, episodes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield support (E, K, S, F), queries (E, P, F) and their classes (E, P) of many episodes at a time; float32."""
    x_nF = x_nF.flatten(1).float()
    points = sampler.episodes.way * sampler.episodes.shot + sampler.queries
    per_batch = max(1, VALUES_PER_BATCH // (points * x_nF.shape[1]))
    for first in range(0, episodes, per_batch):
        rows = sampler.batch(first, min(per_batch, episodes - first))
        support_EKS, query_EP, truth_EP = map(torch.as_tensor, rows)
        yield x_nF[support_EKS], x_nF[query_EP], truth_EP
