"""`metagmvae bench episodes`: judging many episodes, beside encoding every episode afresh with the memory-hungry EM.

Notation: K ways, S shots, Q queries per class, P = K * Q.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.bench.reference import predict_episode
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_images
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.meta_gmvae import MetaGMVAE

WAY, SHOT, QUERY = 20, 5, 15


def bench_episodes(
    model: MetaGMVAE, adapt: AdaptSettings, images: Any, labels: np.ndarray, *, episodes: int, literal_episodes: int
) -> dict[str, Any]:
    """Seconds per episode of both ways on the same episodes, and how often their predictions agree.

    The literal way takes seconds an episode and is timed on fewer of them, half before and half after the
    fast one, so that a change of the machine's load falls on both.

    Args:
        model, adapt: what is judged.
        images, labels: of a split, see `evaluate_images`.
        episodes: 20-way 5-shot episodes of the fast way, encoding of all images included.
        literal_episodes: the first of the same episodes.
    """
    model.eval()
    half = literal_episodes // 2
    before, accuracies = _literal(model, adapt, images, labels, range(half))
    since = time.perf_counter()
    result = evaluate_images(model, adapt, images, labels, way=WAY, shot=SHOT, query=QUERY, episodes=episodes)
    fast = time.perf_counter() - since
    after, more = _literal(model, adapt, images, labels, range(half, literal_episodes))
    accuracies += more
    each, literal_each = fast / episodes, (before + after) / literal_episodes
    difference = np.abs(np.array(accuracies) - result.accuracies[:literal_episodes])
    return {
        "way": WAY,
        "shot": SHOT,
        "query": QUERY,
        "images": len(labels),
        "adapt": adapt.model_dump(),
        "rows": [
            {"form": "literal", "episodes": literal_episodes, "seconds_per_episode": literal_each, "times_faster": 1.0},
            {
                "form": "each image encoded once, episodes in batches",
                "episodes": episodes,
                "seconds_per_episode": each,
                "times_faster": literal_each / each,
            },
        ],
        "seconds_of_all_episodes": fast,
        "largest_difference_in_accuracy": float(difference.max()),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def _literal(
    model: MetaGMVAE, adapt: AdaptSettings, images: Any, labels: np.ndarray, episodes: range
) -> tuple[float, list[float]]:
    """Seconds for these episodes, and their accuracies."""
    sampler = EpisodeSampler(labels, way=WAY, shot=SHOT, query=QUERY, seed=0)
    device = next(model.parameters()).device
    truth_P = torch.arange(WAY, device=device).repeat_interleave(QUERY)
    points = WAY * (SHOT + QUERY)
    accuracies = []
    since = time.perf_counter()
    for index in episodes:
        episode = sampler.episode(index)
        support = torch.as_tensor(images[episode.support.reshape(-1)]).to(device).unflatten(0, (WAY, SHOT))
        query = torch.as_tensor(images[episode.query.reshape(-1)]).to(device)
        generator = keyed_generator(device, "predict", index)  # the noise of `predict_episodes`
        noise = torch.randn(points, adapt.samples, model.latent, generator=generator, device=device)
        guess_P = predict_episode(model, adapt, support, query, noise).argmax(dim=1)
        accuracies.append(float((guess_P == truth_P).double().mean()))
    return time.perf_counter() - since, accuracies
