"""What a result stands beside: nearest class mean on the very same episodes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.benchmark import EpisodeResults
from pipelines.episodes import EpisodeSampler


def nearest_class_mean(
    x_nF: Tensor,
    labels: np.ndarray,
    *,
    way: int,
    shot: int,
    query: int = 15,
    episodes: int = 1000,
    seed: int = 0,
) -> EpisodeResults:
    """Each query goes to the class whose mean support vector is nearest (cosine); every query by itself.

    Args:
        x_nF: one vector per row: pixels or features, any length.
        labels: class ids, (n,); the rest as in `evaluate_features`, whose episodes these are.
    """
    sampler = EpisodeSampler(labels, way=way, shot=shot, query=query, seed=seed)
    x_nF = F.normalize(x_nF.float(), dim=1)
    truth_P = torch.arange(way).repeat_interleave(query)
    accuracies = []
    for index in range(episodes):
        episode = sampler.episode(index)
        means_KF = F.normalize(x_nF[torch.as_tensor(episode.support)].mean(dim=1), dim=1)
        guess_P = (x_nF[torch.as_tensor(episode.query.reshape(-1))] @ means_KF.T).argmax(dim=1)
        accuracies.append(float((guess_P == truth_P).double().mean()))
    return EpisodeResults(way, shot, query, seed, "inductive", np.array(accuracies), 0.0)
