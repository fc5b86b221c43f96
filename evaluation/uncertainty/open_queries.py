"""Accuracy where some queries are of no labelled class: of the model, and of baselines on the same episodes.

A classifier gives two things for each query: the most probable of the K classes, and a score that is high if the query
is of one of them. A query with a score below a threshold is answered "unknown".

Notation: E episodes, K ways, S shots, P queries of an episode, F features, n queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.baseline_tuning import GRIDS, SEED_OFFSET, TUNING_EPISODES, SplitFeatures
from metagmvae.evaluation.fewshot.baselines import feature_batches
from metagmvae.evaluation.fewshot.evaluate_episodes import posterior_batches
from metagmvae.evaluation.fewshot.metrics import Reliability, mean_ci95
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.evaluation.fewshot.query_assignments import soft_k_means_cosines
from metagmvae.evaluation.uncertainty.background import known_score
from metagmvae.pipelines.records import ProgressCallback
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import FittedBackground
from metagmvae.training.objectives.logistic_regression import logistic_regression_logits
from metagmvae.training.objectives.mixture import class_logits, fit_semi_supervised

Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Support (E, K, S, F) and queries (E, P, F) -> predicted classes and scores, (E, P) each."""


@dataclass(frozen=True)
class OpenResults:
    """How well queries of the labelled classes are classified, and the others noticed, over the episodes of a task."""

    name: str
    mode: PredictionMode
    task: Mapping[str, Any]
    """Way, shot, query, episodes, seed, and `open_classes` without labelled images."""
    known: np.ndarray
    """Fraction of the queries of labelled classes whose most probable class is right, by episode, (episodes,)."""
    all: np.ndarray
    """Fraction of all queries that are answered correctly, "unknown" included, by episode, (episodes,)."""
    auroc: float
    """Area under the ROC curve of the score, over all queries: 1/2 at chance."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen on validation classes."""
    reliability: Reliability | None = None
    """Calibration over K + 1 answers; None without probabilities."""
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return plain values; accuracies, `auroc` and `ece` are fractions in [0, 1]."""
        known, known_ci95 = mean_ci95(self.known)
        accuracy, ci95 = mean_ci95(self.all)
        return {
            "model": self.name,
            "mode": self.mode,
            "accuracy": known,
            "ci95": known_ci95,
            "open_accuracy": accuracy,
            "open_ci95": ci95,
            "auroc": self.auroc,
            **({} if self.reliability is None else {"ece": self.reliability.calibration_error}),
            **{key: value for key, value in self.task.items() if value is not None and value is not False},
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 3),
        }


def evaluate_open(
    model: MetaLearner,
    adapt: AdaptSettings,
    h_nF: Tensor,
    labels: np.ndarray,
    task: Mapping[str, Any],
    *,
    mode: PredictionMode,
    background: FittedBackground | None,
    name: str,
    on_progress: ProgressCallback | None = None,
) -> OpenResults:
    """Evaluate a model on episodes with queries of no labelled class.

    Args:
        model: on the device of the features.
        adapt: settings of EM.
        h_nF: features of all images of the split.
        labels: their classes, (n,).
        task: way, shot, query, episodes, seed and `open_classes`, as in `QuerySampler`.
        mode: as in `log_posteriors`.
        background: its level is the threshold, and in transductive mode its component keeps queries of no labelled
            class out of the classes. None: the plain model, whose score is the probability of the most probable class;
            nothing is answered "unknown".
        name: of the model in its result.
        on_progress: called with the number of finished episodes and of all episodes.

    Raises:
        DataError: the split has too few classes, or a class too few images, for the task.
    """
    start = time.perf_counter()
    level = None if background is None else background.background
    episodes, way = task["episodes"], task["way"]
    sampler = QuerySampler(labels, **{key: value for key, value in task.items() if key != "episodes"})
    known, answered, scores, truths, reliability = [], [], [], [], Reliability()
    for log_p_EPK, truth_EP in posterior_batches(
        model, adapt, h_nF, sampler, episodes, mode=mode, background=level, on_progress=on_progress
    ):
        of_class = truth_EP < way
        right = log_p_EPK[..., :way].argmax(dim=2) == truth_EP  # never where the truth is no class
        known.append((right.sum(dim=1) / of_class.sum(dim=1)).cpu())
        answered.append((log_p_EPK.argmax(dim=2) == truth_EP).double().mean(dim=1).cpu())
        log_p_nK, truth_n = log_p_EPK.flatten(0, 1).cpu().numpy(), truth_EP.flatten().cpu().numpy()
        scores.append(log_p_nK.max(axis=1) if background is None else known_score(log_p_nK))
        truths.append(truth_n)
        if background is not None:
            probabilities_nK = calibrated(log_p_EPK, background).flatten(0, 1).cpu().numpy()
            reliability.add(probabilities_nK, truth_n)
    auroc = roc_auc_score(np.concatenate(truths) < way, np.concatenate(scores))
    return OpenResults(
        name if background is not None else f"{name} without background component",
        mode,
        task,
        torch.cat(known).double().numpy(),
        torch.cat(answered).numpy(),
        float(auroc),
        {} if background is None else background.model_dump(include={"background", "temperature", "uniform"}),
        None if background is None else reliability,
        time.perf_counter() - start,
    )


def nearest_class_mean_scores(support_EKSF: Tensor, query_EPF: Tensor) -> tuple[Tensor, Tensor]:
    """Score a query by its largest cosine to a class mean, as in `baselines.nearest_class_mean`."""
    mean_EKF = F.normalize(F.normalize(support_EKSF, dim=3).mean(dim=2), dim=2)
    return _best(F.normalize(query_EPF, dim=2) @ mean_EKF.transpose(1, 2))


def logistic_regression_scores(support_EKSF: Tensor, query_EPF: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Score a query by the log-probability of its most probable class."""
    support_EKSF, query_EPF = F.normalize(support_EKSF, dim=3), F.normalize(query_EPF, dim=2)
    return _best(logistic_regression_logits(support_EKSF, query_EPF, strength).log_softmax(dim=2))


def soft_k_means_scores(support_EKSF: Tensor, query_EPF: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Score a query by its largest cosine to a refined class mean."""
    return _best(soft_k_means_cosines(support_EKSF, query_EPF, temperature, iterations=10))


def em_scores(support_EKSF: Tensor, query_EPF: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Score a query by its log density under the mixture that EM with identity covariance fits to the features."""
    mixture = fit_semi_supervised(support_EKSF, query_EPF, iterations=10, e_step="identity", temperature=temperature)
    logits_EPK = class_logits(mixture, query_EPF, "identity", temperature)
    return logits_EPK.argmax(dim=2), torch.logsumexp(logits_EPK, dim=2)


BASELINES: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], PredictionMode]] = {
    "nearest class mean": (nearest_class_mean_scores, "inductive"),
    "logistic regression": (logistic_regression_scores, "inductive"),
    "soft k-means": (soft_k_means_scores, "transductive"),
    "EM on features, identity": (em_scores, "transductive"),
}
"""Names of `baselines.BASELINES`; their candidates are those of `baseline_tuning.GRIDS`."""


def evaluate_open_baselines(
    evaluated: SplitFeatures, validation: SplitFeatures, task: Mapping[str, Any]
) -> Iterator[OpenResults]:
    """Evaluate the baselines, with settings, kind of features and threshold chosen on validation classes.

    The choice is that of the highest accuracy over all queries of up to 300 validation episodes of the same task.

    Args:
        evaluated: features of the evaluated split.
        validation: features of the validation classes.
        task: as in `evaluate_open`.
    """
    trial = {**task, "episodes": min(TUNING_EPISODES, task["episodes"]), "seed": task["seed"] + SEED_OFFSET}
    for name, (scorer, mode) in BASELINES.items():
        start = time.perf_counter()
        grid = GRIDS[name]
        best: tuple[float, float, dict[str, Any], str] = (-1.0, 0.0, {}, "scaled")
        for kind, *values in product(evaluated.by_kind, *grid.values()):
            settings = dict(zip(grid, values, strict=True))
            answers = _answers(partial(scorer, **settings), validation.by_kind[kind], validation.labels, trial)
            threshold = best_threshold(*(part.reshape(-1) for part in answers), way=task["way"])
            accuracy = float(_answered(*answers, threshold, task["way"]).mean())
            if accuracy > best[0]:
                best = (accuracy, threshold, settings, kind)
        accuracy, threshold, settings, kind = best
        answers = _answers(partial(scorer, **settings), evaluated.by_kind[kind], evaluated.labels, task)
        predicted, score, truth = answers
        of_class = truth < task["way"]
        known = (predicted == truth).sum(axis=1) / of_class.sum(axis=1)
        yield OpenResults(
            name,
            mode,
            task,
            known,
            _answered(*answers, threshold, task["way"]),
            float(roc_auc_score(of_class.reshape(-1), score.reshape(-1))),
            {**settings, "features": kind, "threshold": threshold, "validation_accuracy": accuracy},
            seconds=time.perf_counter() - start,
        )


def best_threshold(predicted: np.ndarray, score: np.ndarray, truth: np.ndarray, *, way: int) -> float:
    """Return the score below which "unknown" gives the highest accuracy over all queries.

    Args:
        predicted: most probable class of each query, (n,).
        score: (n,).
        truth: class of each query, `way` for a query of no labelled class, (n,).
        way: K.
    """
    order = np.argsort(score, kind="stable")
    right, unknown = (predicted == truth)[order], (truth == way)[order]
    # Correct answers if the first i queries in the order of the score are answered "unknown".
    correct = np.concatenate([[0], np.cumsum(unknown)]) + right.sum() - np.concatenate([[0], np.cumsum(right)])
    cut = int(correct.argmax())
    ends = np.concatenate([[score[order[0]] - 1], score[order], [score[order[-1]] + 1]])
    return float((ends[cut] + ends[cut + 1]) / 2)


def _answers(
    scorer: Scorer, x_nF: Tensor, labels: np.ndarray, task: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted class, score and true class of each query, (E, P) each."""
    sampler, parts = QuerySampler(labels, **{key: value for key, value in task.items() if key != "episodes"}), []
    for support_EKSF, query_EPF, truth_EP in feature_batches(x_nF, sampler, task["episodes"]):
        predicted, score = scorer(support_EKSF, query_EPF)
        parts.append((predicted.cpu().numpy(), score.double().cpu().numpy(), truth_EP.numpy()))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _answered(predicted: np.ndarray, score: np.ndarray, truth: np.ndarray, threshold: float, way: int) -> np.ndarray:
    """Fraction of the queries of each episode that are answered correctly, (E,)."""
    return (np.where(score < threshold, way, predicted) == truth).mean(axis=1)


def _best(score_EPK: Tensor) -> tuple[Tensor, Tensor]:
    best = score_EPK.max(dim=2)
    return best.indices, best.values
