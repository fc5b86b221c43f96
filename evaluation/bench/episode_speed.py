"""`metagmvae bench episodes`: evaluation speed compared with a literal evaluation, episode by episode.

The literal evaluation encodes the images of each episode again and runs EM on large temporary tensors.

Notation: K ways, S shots, Q queries per class, P = K * Q.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.bench.processor_time import times
from metagmvae.evaluation.bench.reference import predict_episode
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_images
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.methods.meta_gmvae import MetaGMVAE, latent_noise

WAY, SHOT, QUERY = 20, 5, 15


def bench_episodes(
    model: MetaGMVAE, adapt: AdaptSettings, images: Any, labels: np.ndarray, *, episodes: int, literal_episodes: int
) -> dict[str, Any]:
    """Measure the seconds per episode of both evaluations, and their largest difference in accuracy.

    Processor time, of all threads, hardly depends on other load of the machine.

    The literal evaluation takes seconds per episode, so it is timed on fewer episodes: half of them before the fast
    evaluation and half after it, so that a change of the machine's load affects both.

    Args:
        model, adapt: the model and how it adapts to an episode.
        images, labels: of a split, see `evaluate_images`.
        episodes: number of 20-way 5-shot episodes of the fast evaluation; its time includes encoding all images.
        literal_episodes: number of episodes of the literal evaluation, the first ones of the same sequence.
    """
    model.eval()
    half = literal_episodes // 2
    before, accuracies = _literal(model, adapt, images, labels, range(half))
    start = times()
    result = evaluate_images(model, adapt, images, labels, way=WAY, shot=SHOT, query=QUERY, episodes=episodes)
    fast = times() - start
    after, later_accuracies = _literal(model, adapt, images, labels, range(half, literal_episodes))
    accuracies += later_accuracies
    fast_each, literal_each = (fast / episodes).tolist(), ((before + after) / literal_episodes).tolist()
    difference = np.abs(np.array(accuracies) - result.accuracies[:literal_episodes])
    return {
        "way": WAY,
        "shot": SHOT,
        "query": QUERY,
        "images": len(labels),
        "adapt": adapt.model_dump(),
        "rows": [
            _row("literal", literal_episodes, literal_each, 1.0),
            _row("each image encoded once, episodes in batches", episodes, fast_each, literal_each[0] / fast_each[0]),
        ],
        "seconds_of_all_episodes": float(fast[0]),
        "largest_difference_in_accuracy": float(difference.max()),
        "threads": torch.get_num_threads(),
    }


def _row(form: str, episodes: int, each: list[float], times_faster: float) -> dict[str, Any]:
    return {
        "form": form,
        "episodes": episodes,
        "seconds_per_episode": each[0],
        "processor_seconds_per_episode": each[1],
        "times_faster": times_faster,
    }


@torch.inference_mode()
def _literal(
    model: MetaGMVAE, adapt: AdaptSettings, images: Any, labels: np.ndarray, episodes: range
) -> tuple[np.ndarray, list[float]]:
    """Evaluate episodes literally; return the seconds in all, as `times` gives them, and the accuracies."""
    sampler = EpisodeSampler(labels, way=WAY, shot=SHOT, query=QUERY, seed=0)
    device = next(model.parameters()).device
    label_P = torch.arange(WAY, device=device).repeat_interleave(QUERY)
    accuracies = []
    start = times()
    for index in episodes:
        episode = sampler.episode(index)
        support = torch.as_tensor(images[episode.support.reshape(-1)]).to(device).unflatten(0, (WAY, SHOT))
        query = torch.as_tensor(images[episode.query.reshape(-1)]).to(device)
        noise = latent_noise(model, adapt, WAY * (SHOT + QUERY), index, device)  # that of the model
        predicted_P = predict_episode(model, adapt, support, query, noise).argmax(dim=1)
        accuracies.append(float((predicted_P == label_P).double().mean()))
    return times() - start, accuracies
