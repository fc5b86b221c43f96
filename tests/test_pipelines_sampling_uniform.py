"""Episodes and training sets are drawn uniformly from all classes and from all images (chi-squared tests)."""

from __future__ import annotations

import numpy as np
from scipy.stats import chisquare

from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.sampling.indexed import SetStream

CLASSES, PER_CLASS = 12, 10
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), PER_CLASS))
LEAST_P = 1e-3


def is_uniform(counts: np.ndarray) -> bool:
    return bool(counts.min() > 0 and chisquare(counts).pvalue > LEAST_P)


def test_every_class_is_equally_likely_in_an_episode_and_at_each_place_of_it() -> None:
    sampler = EpisodeSampler(LABELS, way=3, shot=1, query=2, seed=0)
    classes = np.stack([sampler.episode(index).classes for index in range(1500)])
    assert is_uniform(np.bincount(classes.ravel(), minlength=CLASSES))
    for place in range(3):
        assert is_uniform(np.bincount(classes[:, place], minlength=CLASSES))


def test_every_image_of_a_class_is_equally_likely_as_support_and_as_query() -> None:
    sampler = EpisodeSampler(LABELS, way=5, shot=2, query=3, seed=1)
    support, query = sampler.batch(0, 1500)
    for rows in (support, query):
        assert is_uniform(np.bincount(rows.ravel(), minlength=len(LABELS)))


def test_every_training_image_is_equally_likely_in_a_set() -> None:
    images = np.zeros((50, 1, 1, 1), dtype=np.uint8)
    stream = SetStream(images, batch=1, set_size=25, seed=0, split="train")
    try:
        rows = np.concatenate([stream.rows(episode) for episode in range(200)])
    finally:
        stream.close()
    assert is_uniform(np.bincount(rows, minlength=len(images)))
    halves = [np.concatenate([stream.rows(e) for e in range(part, 400, 2)]) for part in range(2)]
    assert all(is_uniform(np.bincount(half, minlength=len(images))) for half in halves)
