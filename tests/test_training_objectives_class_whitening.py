"""Whitening within classes: a literal transcription, its limits, and what it does to distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.objectives.class_whitening import whiten_classes
from metagmvae.training.objectives.episode_features import adapt_features
from metagmvae.training.objectives.feature_diffusion import diffuse_features


def random_episodes(shots, size, queries=4, episodes=2):
    generator = torch.Generator().manual_seed(0)
    label_T = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    label_T = label_T[torch.randperm(len(label_T), generator=generator)]
    points = (torch.randn(episodes, n, size, generator=generator, dtype=torch.float64) for n in (len(label_T), queries))
    support, query = (torch.nn.functional.normalize(h, dim=2) * math.sqrt(size) for h in points)
    return support, label_T, query


def literal(support, labels, points, strength):
    """Plain loops: the covariance, its inverse square root by its eigenvectors, and the features again at length."""
    T, F = support.shape
    K = int(labels.max()) + 1
    means = [np.mean([support[t] for t in range(T) if labels[t] == k], axis=0) for k in range(K)]
    rest = [support[t] - means[labels[t]] for t in range(T)]
    n = T - K
    v = sum(float(r @ r) for r in rest) / (n * F)
    nu = F / strength
    sigma = (nu * v * np.eye(F) + sum(np.outer(r, r) for r in rest)) / (nu + n)
    values, vectors = np.linalg.eigh(sigma)
    root = sum(np.outer(vectors[:, i], vectors[:, i]) / math.sqrt(values[i]) for i in range(F))
    moved = [root @ h for h in points]
    return np.stack([h / np.linalg.norm(h) * math.sqrt(F) for h in moved])


@pytest.mark.parametrize("strength", [0.3, 2.0])
@pytest.mark.parametrize("shots", [[3, 3, 3], [1, 4, 2], [1, 2], [8, 9, 7]])  # the last: more images than features
def test_equals_the_shrunk_covariance_within_classes(shots, strength):
    support, label_T, query = random_episodes(shots, size=6)
    moved_support, moved_query = whiten_classes(support, label_T, query, strength)
    for e in range(len(support)):
        for moved, points in ((moved_support, support), (moved_query, query)):
            expected = literal(support[e].numpy(), label_T.numpy(), points[e].numpy(), strength)
            np.testing.assert_allclose(moved[e].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_without_strength_or_a_second_image_of_a_class_features_stay():
    for strength, shots in ((0.0, [3, 3]), (1.0, [1, 1, 1])):
        support, label_T, query = random_episodes(shots, size=6)
        same = whiten_classes(support, label_T, query, strength)
        assert same[0] is support
        assert same[1] is query


def test_equal_images_of_a_class_change_nothing():
    support, label_T, query = random_episodes([1, 1], size=6)
    twice, labels = support.repeat(1, 2, 1), label_T.repeat(2)
    moved = whiten_classes(twice, labels, query, 1.0)
    torch.testing.assert_close(moved[0], twice)
    torch.testing.assert_close(moved[1], query)


def test_does_not_depend_on_other_queries_and_episodes_or_on_order_and_names_of_classes():
    support, label_T, query = random_episodes([2, 4, 3], size=20)
    moved_support, moved_query = whiten_classes(support, label_T, query, 1.0)
    order, names = torch.randperm(9, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0, 1])
    again = whiten_classes(support[1:, order], names[label_T[order]], query[1:, 2:3], 1.0)
    torch.testing.assert_close(again[0], moved_support[1:, order])
    torch.testing.assert_close(again[1], moved_query[1:, 2:3])


def test_float32_features_keep_their_type_and_nearly_their_values():
    support, label_T, query = random_episodes([10, 10, 10], size=64)
    expected = whiten_classes(support, label_T, query, 5.0)
    for moved, exact in zip(whiten_classes(support.float(), label_T, query.float(), 5.0), expected, strict=True):
        torch.testing.assert_close(moved, exact.float(), atol=1e-5, rtol=1e-4)


def test_directions_in_which_images_of_a_class_differ_count_less():
    """Classes differ in 5 dimensions and, three times as strongly, within themselves in 5 others."""
    generator = torch.Generator().manual_seed(0)
    label_n = torch.arange(4).repeat_interleave(40)
    h_nF = 0.3 * torch.randn(160, 32, generator=generator)
    h_nF[:, :5] += torch.randn(4, 5, generator=generator)[label_n]
    h_nF[:, 5:10] += 3 * torch.randn(160, 5, generator=generator)
    h_nF = torch.nn.functional.normalize(h_nF, dim=1) * math.sqrt(32)
    is_query = torch.arange(160) % 40 >= 10
    support, query = h_nF[None, ~is_query], h_nF[None, is_query]

    def accuracy(strength):
        a, b = whiten_classes(support, label_n[~is_query], query, strength)
        means = a[0].unflatten(0, (4, 10)).mean(dim=1)
        return (torch.cdist(b[0], means).argmin(dim=1) == label_n[is_query]).double().mean()

    assert accuracy(20.0) > accuracy(0.0) + 0.15


@pytest.mark.parametrize("transductive", [True, False])
def test_features_of_an_episode_are_whitened_and_then_diffused(transductive):
    support, label_T, query = random_episodes([2, 3], size=8)
    adapt = AdaptSettings(whitening=0.7, diffusion=0.4)
    moved = torch.cat(adapt_features(adapt, support, label_T, query, transductive=transductive), dim=1)
    whitened = torch.cat(whiten_classes(support, label_T, query, 0.7), dim=1)
    torch.testing.assert_close(moved, diffuse_features(whitened, 0.4) if transductive else whitened)
