"""Few-shot accuracy of a model over seeded episodes. Every image is encoded once for all episodes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.metrics import Reliability, mean_ci95
from metagmvae.evaluation.fewshot.predict import calibrated, log_posteriors
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import ProgressCallback, Rows
from metagmvae.pipelines.sampling.episodes import GroupProtocol
from metagmvae.pipelines.sampling.query_sets import QuerySampler
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import UNCALIBRATED, CalibrationMap


@dataclass(frozen=True)
class Tuning:
    """Settings of a baseline, and how they were chosen on validation classes."""

    settings: Mapping[str, Any]
    """The chosen values; empty if there is nothing to choose."""
    trials: tuple[Mapping[str, Any], ...] = ()
    """`settings`, `accuracy` and `ci95` of each candidate on the validation episodes; empty if nothing was tried."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """`split`, `episodes` and `seed` of the validation episodes; empty if nothing was tried."""
    note: str = ""
    """Why the settings are the defaults, or another reason to doubt them."""

    @property
    def accuracy(self) -> float | None:
        """Validation accuracy of the chosen settings; None if nothing was tried."""
        return max((trial["accuracy"] for trial in self.trials), default=None)

    def summary(self) -> dict[str, Any]:
        """Return `settings`, and `validation_accuracy` and `note` where there are any."""
        chosen = {"validation_accuracy": self.accuracy, "note": self.note}
        return {"settings": dict(self.settings)} | {
            key: value for key, value in chosen.items() if value not in (None, "")
        }


@dataclass(frozen=True)
class EpisodeResults:
    """Accuracies of one model over the episodes of one task."""

    way: int
    shot: int
    query: int
    """Queries per class."""
    seed: int
    mode: PredictionMode
    accuracies: np.ndarray
    """Fraction of correct queries in each episode, (episodes,)."""
    seconds: float
    reliability: Reliability | None = None
    """Calibration of the probabilities over all queries; None for classifiers without probabilities."""
    baselines: Mapping[str, EpisodeResults] = field(default_factory=dict)
    """Results of the baselines on the same features and episodes, by name; empty unless requested."""
    tuning: Tuning | None = None
    """The settings of a baseline, or of the head of an encoder; None for a model."""
    head: str = ""
    """Classifier on the features of an encoder alone, by its name in `evaluation.encoders.heads`; empty for a model."""
    unbalanced: bool = False
    """Whether only half of the classes have `query` queries, and the others one each."""
    dirichlet: float | None = None
    """Alpha of the Dirichlet distribution of the proportions of the classes; None: not drawn from one."""
    capped: int = 0
    """Episodes in which a class had fewer images than the Dirichlet-drawn queries asked for (`QuerySampler`)."""
    calibration: CalibrationMap = UNCALIBRATED
    """Of the probabilities, as in `predict.calibrated`."""
    uncalibrated: Reliability | None = None
    """Reliability without it; None if it changes nothing."""
    groups: GroupProtocol | None = None
    """Whether labelled images and queries were of different groups; None: the dataset has no groups."""
    left_out: tuple[str, ...] = ()
    """Names of the classes whose groups do not suffice for the task (`EpisodeSampler`)."""

    @property
    def mean(self) -> float:
        """Mean accuracy, a fraction in [0, 1]."""
        return mean_ci95(self.accuracies)[0]

    @property
    def ci95(self) -> float | None:
        """Half-width of the 95% confidence interval over episodes; None for a single episode."""
        return mean_ci95(self.accuracies)[1]

    def summary(self) -> dict[str, Any]:
        """Return plain values; accuracy and ci95 are fractions in [0, 1]."""
        return {
            "accuracy": self.mean,
            "ci95": self.ci95,
            "way": self.way,
            "shot": self.shot,
            "query": self.query,
            "episodes": len(self.accuracies),
            "seed": self.seed,
            "mode": self.mode,
            "seconds": round(self.seconds, 3),
            **({"head": self.head} if self.head else {}),
            **({"unbalanced": True} if self.unbalanced else {}),
            **({} if self.dirichlet is None else {"dirichlet": self.dirichlet, "capped_episodes": self.capped}),
            **({} if self.groups is None else {"groups": self.groups}),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
            **self._calibration_summary(),
        }

    def _calibration_summary(self) -> dict[str, float]:
        """Expected calibration error and mean confidence, fractions in [0, 1]; empty without probabilities."""
        if self.reliability is None:
            return {}
        raw = self.uncalibrated or self.reliability
        return {
            "ece": self.reliability.calibration_error,
            "ece_uncalibrated": raw.calibration_error,
            "confidence": self.reliability.mean_confidence,
            "temperature": self.calibration.temperature,
            "uniform": self.calibration.uniform,
        }

    def write_parquet(self, path: str | Path) -> None:
        """Write one row per episode; see `episode_table`."""
        write_episodes(path, [self])

    def episode_table(self) -> pa.Table:
        """Return one row per episode: its number, its accuracy, and the task.

        The accuracies of the baselines follow in columns `baseline: NAME`.
        """
        count = len(self.accuracies)
        return pa.table(
            {
                "episode": np.arange(count),
                "accuracy": self.accuracies,
                **{k: [v] * count for k, v in self.summary().items() if k in ("way", "shot", "query", "seed")},
                "mode": [self.mode] * count,
                **{f"baseline: {name}": baseline.accuracies for name, baseline in self.baselines.items()},
            }
        )


def write_episodes(path: str | Path, results: Sequence[EpisodeResults]) -> None:
    """Write one row per episode of each task to a Parquet file; see `EpisodeResults.episode_table`."""
    tables = [result.episode_table() for result in results]
    with atomic_file(path) as file:
        pq.write_table(pa.concat_tables(tables), file)


def evaluate_images(
    model: MetaLearner, adapt: AdaptSettings, images: Rows, labels: EpisodeLabels, **task: Any
) -> EpisodeResults:
    """Evaluate a model on the images of a split, uint8 (n, C, H, W); see `evaluate_features` for the task."""
    h_nF = encode_images(model, images, next(model.parameters()).device)
    return evaluate_features(model, adapt, h_nF, labels, **task)


@torch.inference_mode()
def posterior_batches(
    model: MetaLearner,
    adapt: AdaptSettings,
    h_nF: Tensor,
    sampler: QuerySampler,
    episodes: int,
    *,
    mode: PredictionMode = "transductive",
    background: float | None = None,
    on_progress: ProgressCallback | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Classify episodes 0 to `episodes` - 1 of a sampler, as many at a time as fit the memory.

    Args:
        model, adapt, h_nF, on_progress: as in `evaluate_features`.
        sampler: of the episodes.
        episodes: number of episodes.
        mode, background: as in `log_posteriors`, which the result comes from.

    Yields:
        log-probabilities of the queries, float64, (E, P, K) or (E, P, K + 1), and their classes, (E, P).
    """
    points = sampler.episodes.way * sampler.episodes.shot + sampler.queries
    per_batch = model.episodes_per_batch(adapt, points, h_nF.device)
    for first in range(0, episodes, per_batch):
        count = min(per_batch, episodes - first)
        support_EKS, query_EP, truth_EP = (torch.as_tensor(rows) for rows in sampler.batch(first, count))
        seeds = range(first, first + count)
        log_p_EPK = log_posteriors(
            model, adapt, h_nF[support_EKS], h_nF[query_EP], mode=mode, seed_by_episode=seeds, background=background
        )
        yield log_p_EPK, truth_EP.to(h_nF.device)
        if on_progress is not None:
            on_progress(first + count, episodes)


@torch.inference_mode()
def evaluate_features(
    model: MetaLearner,
    adapt: AdaptSettings,
    h_nF: Tensor,
    labels: EpisodeLabels,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    mode: PredictionMode = "transductive",
    unbalanced: bool = False,
    dirichlet: float | None = None,
    mix_groups: bool = False,
    calibration: CalibrationMap = UNCALIBRATED,
    on_progress: ProgressCallback | None = None,
) -> EpisodeResults:
    """Evaluate a model on features by `encode_images`, over episodes 0 to `episodes` - 1 of a seed.

    Way and shot need not be those of training. The accuracies do not depend on how episodes are batched.

    Args:
        model: on the device of the features.
        adapt: settings of EM.
        h_nF: features of all images of the split.
        labels: their classes, (n,), and groups (`Dataset.episode_labels`).
        way: classes per episode.
        shot: labelled images per class.
        query: queries per class.
        episodes: number of episodes.
        seed: of the draw of the episodes.
        mode: as in `log_posteriors`.
        unbalanced: half of the classes of each episode have `query` queries and the others one (`query_positions`).
        dirichlet: alpha of the Dirichlet distribution that the proportions of the classes are drawn from
            (`QuerySampler`); None: balanced queries.
        mix_groups: draw episodes regardless of the groups.
        calibration: as in `calibrated`; the accuracy does not depend on it.
        on_progress: called with the number of finished episodes and of all episodes.

    Raises:
        DataError: the split has too few classes, or a class too few images, for the task.
    """
    start = time.perf_counter()
    task: dict[str, Any] = {"way": way, "shot": shot, "query": query, "seed": seed}
    task |= {"unbalanced": unbalanced, "dirichlet": dirichlet}
    sampler = QuerySampler(labels, **task, mix_groups=mix_groups)
    accuracies, reliability, uncalibrated = [], Reliability(), Reliability()
    batches = posterior_batches(model, adapt, h_nF, sampler, episodes, mode=mode, on_progress=on_progress)
    for log_p_EPK, truth_EP in batches:
        truth = truth_EP.flatten().cpu().numpy()
        for collected, by in ((reliability, calibration), (uncalibrated, UNCALIBRATED)):
            collected.add(calibrated(log_p_EPK, by).flatten(0, 1).cpu().numpy(), truth)
        accuracies.append((log_p_EPK.argmax(dim=2) == truth_EP).double().mean(dim=1).cpu())
    seconds = time.perf_counter() - start
    return EpisodeResults(
        **task,
        mode=mode,
        accuracies=torch.cat(accuracies).numpy(),
        seconds=seconds,
        reliability=reliability,
        capped=sampler.capped,
        calibration=calibration,
        uncalibrated=None if calibration.is_identity else uncalibrated,
        groups=sampler.episodes.groups,
        left_out=sampler.episodes.left_out,
    )
