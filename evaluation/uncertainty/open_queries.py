"""Accuracy where some queries are of no labelled class: of the model, and of baselines on the same episodes.

A classifier gives two things for each query: the most probable of the K classes, and a score that is high if the query
is of one of them. A query with a score below a threshold is answered "unknown".

Notation: E episodes, K ways, S shots, P queries of an episode, F features, n queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.baseline_tuning import SEED_OFFSET, TUNING_EPISODES, SplitFeatures
from metagmvae.evaluation.fewshot.baselines import BASELINES as CLASSIFIERS
from metagmvae.evaluation.fewshot.baselines import feature_batches
from metagmvae.evaluation.fewshot.evaluate_episodes import posterior_batches
from metagmvae.evaluation.fewshot.metrics import Reliability, mean_ci95
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.evaluation.uncertainty.background import known_score
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import ProgressCallback
from metagmvae.pipelines.sampling.episodes import GroupProtocol, group_protocol
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import FittedBackground


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
    groups: GroupProtocol | None = None
    """As in `EpisodeResults`."""

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
            **{k: v for k, v in self.task.items() if v is not None and v is not False and k != "mix_groups"},
            **({} if self.groups is None else {"groups": self.groups}),
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 3),
        }


def evaluate_open(
    model: MetaLearner,
    adapt: AdaptSettings,
    h_nF: Tensor,
    labels: EpisodeLabels,
    task: Mapping[str, Any],
    *,
    mode: PredictionMode,
    background: FittedBackground | None,
    name: str,
    on_progress: ProgressCallback | None = None,
) -> OpenResults:
    """Evaluate a model on episodes with queries of no labelled class.

    Args:
        model, adapt, h_nF, labels, mode, on_progress: as in `evaluate_features`.
        task: way, shot, query, episodes, seed and `open_classes`, as in `QuerySampler`.
        background: its level is the threshold, and in transductive mode its component keeps queries of no labelled
            class out of the classes. None: the plain model, whose score is the probability of the most probable class;
            nothing is answered "unknown".
        name: of the model in its result.

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
        sampler.episodes.groups,
    )


def _largest(score_EPK: Tensor) -> Tensor:
    return score_EPK.amax(dim=2)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest class mean": _largest,
    "logistic regression": lambda logits_EPK: _largest(logits_EPK.log_softmax(dim=2)),
    "soft k-means": _largest,
    "EM on features, identity": lambda logits_EPK: logits_EPK.logsumexp(dim=2),
}
"""Names of `baselines.BASELINES` -> score of a query, (E, P), from those of its classes: the largest cosine or
log-probability, or the log density under the mixture."""


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
    for name in BASELINES:
        start = time.perf_counter()
        grid = CLASSIFIERS[name].grid
        best: tuple[float, float, dict[str, Any], str] = (-1.0, 0.0, {}, "scaled")
        for kind, *values in product(evaluated.by_kind, *grid.values()):
            settings = dict(zip(grid, values, strict=True))
            answers = _answers(name, settings, validation.by_kind[kind], validation.labels, trial)
            threshold = best_threshold(*(part.reshape(-1) for part in answers), way=task["way"])
            accuracy = float(_answered(*answers, threshold, task["way"]).mean())
            if accuracy > best[0]:
                best = (accuracy, threshold, settings, kind)
        accuracy, threshold, settings, kind = best
        answers = _answers(name, settings, evaluated.by_kind[kind], evaluated.labels, task)
        predicted, score, truth = answers
        of_class = truth < task["way"]
        known = (predicted == truth).sum(axis=1) / of_class.sum(axis=1)
        yield OpenResults(
            name,
            CLASSIFIERS[name].mode,
            task,
            known,
            _answered(*answers, threshold, task["way"]),
            float(roc_auc_score(of_class.reshape(-1), score.reshape(-1))),
            {**settings, "features": kind, "threshold": threshold, "validation_accuracy": accuracy},
            seconds=time.perf_counter() - start,
            groups=group_protocol(evaluated.labels, task.get("mix_groups", False)),
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
    name: str, settings: Mapping[str, Any], x_nF: Tensor, labels: EpisodeLabels, task: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted class, score and true class of each query, (E, P) each."""
    sampler, parts = QuerySampler(labels, **{key: value for key, value in task.items() if key != "episodes"}), []
    for support_EKSF, query_EPF, truth_EP in feature_batches(x_nF, sampler, task["episodes"]):
        score_EPK = CLASSIFIERS[name].scores(support_EKSF, query_EPF, **settings)
        score_EP = BASELINES[name](score_EPK).double()
        parts.append((score_EPK.argmax(dim=2).cpu().numpy(), score_EP.cpu().numpy(), truth_EP.numpy()))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _answered(predicted: np.ndarray, score: np.ndarray, truth: np.ndarray, threshold: float, way: int) -> np.ndarray:
    """Fraction of the queries of each episode that are answered correctly, (E,)."""
    return (np.where(score < threshold, way, predicted) == truth).mean(axis=1)
