"""Few-shot accuracy over seeded episodes, with intervals; every image is encoded once for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.metrics import Reliability, mean_ci95
from metagmvae.evaluation.fewshot.predict import Mode, encode_images, episodes_at_once, predict_episodes
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import ProgressCallback
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.models.meta_gmvae import MetaGMVAE


@dataclass(frozen=True)
class EpisodeResults:
    """Accuracies of the episodes of one (way, shot)."""

    way: int
    shot: int
    query: int
    seed: int
    mode: Mode
    accuracies: np.ndarray
    """Share of queries that were right, (episodes,)."""
    seconds: float
    reliability: Reliability | None = None
    """Of the probabilities, over all queries; None where there are none."""

    @property
    def mean(self) -> float:
        return mean_ci95(self.accuracies)[0]

    @property
    def ci95(self) -> float:
        return mean_ci95(self.accuracies)[1]

    def summary(self) -> dict[str, Any]:
        """As plain values; accuracy and ci95 are shares in [0, 1]."""
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
        }

    def write_parquet(self, path: str | Path) -> None:
        """One row per episode: its number and accuracy, and what it was an episode of."""
        count = len(self.accuracies)
        table = pa.table(
            {
                "episode": np.arange(count),
                "accuracy": self.accuracies,
                **{k: [v] * count for k, v in self.summary().items() if k in ("way", "shot", "query", "seed")},
                "mode": [self.mode] * count,
            }
        )
        with atomic_file(path) as file:
            pq.write_table(table, file)


def evaluate(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    images: Any,
    labels: np.ndarray,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    mode: Mode = "transductive",
    device: torch.device | None = None,
) -> EpisodeResults:
    """Judge a model on images of a split; see `evaluate_features`."""
    device = device or next(model.parameters()).device
    h_nF = encode_images(model, images, device)
    return evaluate_features(
        model, adapt, h_nF, labels, way=way, shot=shot, query=query, episodes=episodes, seed=seed, mode=mode
    )


@torch.inference_mode()
def evaluate_features(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_nF: Tensor,
    labels: np.ndarray,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    mode: Mode = "transductive",
    on_progress: ProgressCallback | None = None,
) -> EpisodeResults:
    """Judge a model on features by `encode_images`, over episodes 0 .. episodes - 1 of a seed.

    Any way and shot will do, whatever K was in training. Accuracies do not depend on the batching.

    Raises:
        DataError: too few classes or images for the request; says how many there are.
    """
    since = time.perf_counter()
    sampler = EpisodeSampler(labels, way=way, shot=shot, query=query, seed=seed)
    at_once = episodes_at_once(way * (shot + query), adapt, model.latent, h_nF.device)
    truth_P = torch.arange(way, device=h_nF.device).repeat_interleave(query)
    correct, reliability = [], Reliability()
    for first in range(0, episodes, at_once):
        count = min(at_once, episodes - first)
        support_EKS, query_EKQ = (torch.as_tensor(rows) for rows in sampler.batch(first, count))
        probabilities = predict_episodes(
            model,
            adapt,
            h_nF[support_EKS],
            h_nF[query_EKQ.flatten(1)],
            mode=mode,
            seed_by_episode=range(first, first + count),
        )
        reliability.add(probabilities.flatten(0, 1).cpu().numpy(), truth_P.repeat(count).cpu().numpy())
        correct.append((probabilities.argmax(dim=2) == truth_P).double().mean(dim=1).cpu())
        if on_progress is not None:
            on_progress(first + count, episodes)
    seconds = time.perf_counter() - since
    return EpisodeResults(way, shot, query, seed, mode, torch.cat(correct).numpy(), seconds, reliability)


def cross_way(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_nF: Tensor,
    labels: np.ndarray,
    *,
    ways: Sequence[int] = (2, 5, 10, 15, 20, 30, 40, 50),
    shot: int = 1,
    **options: Any,
) -> list[EpisodeResults]:
    """Table 2, right: one model on tasks of many ways; components at test follow the way."""
    return [evaluate_features(model, adapt, h_nF, labels, way=way, shot=shot, **options) for way in ways]
