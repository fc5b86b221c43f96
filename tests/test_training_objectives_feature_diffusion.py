"""Diffusion of features: a literal transcription, its limits, and what it does to episodes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metagmvae.training.objectives.feature_diffusion import SHARPNESS, diffuse_features

FEATURES = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def unit(v):
    return v / math.sqrt(sum(x * x for x in v))


def centred(points):
    mean = sum(points) / len(points)
    return [unit(point - mean) for point in points]


def literal(points, weight, layers=3000):
    """Plain loops: y <- c + weight S y from y = 0 until it stays."""
    c = centred([unit(point) for point in points])
    M = len(c)
    A = [[0.0 if i == j else math.exp(SHARPNESS * (float(c[i] @ c[j]) - 1)) for j in range(M)] for i in range(M)]
    D = [sum(row) for row in A]
    y = [0 * point for point in c]
    for _ in range(layers):
        y = [c[i] + weight * sum(A[i][j] / math.sqrt(D[i] * D[j]) * y[j] for j in range(M)) for i in range(M)]
    return np.stack(centred(y)) * math.sqrt(len(c[0]))


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
def test_equals_infinitely_many_layers_of_attention(weight):
    result = diffuse_features(FEATURES, weight)
    for e in range(3):
        np.testing.assert_allclose(result[e].numpy(), literal(FEATURES[e].numpy(), weight, 300), rtol=1e-9, atol=1e-9)


def test_does_not_depend_on_order_length_or_other_sets():
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    expected = diffuse_features(FEATURES, 0.7)
    torch.testing.assert_close(diffuse_features(4 * FEATURES[:, order], 0.7), expected[:, order])
    torch.testing.assert_close(diffuse_features(FEATURES[1:2], 0.7), expected[1:2])


def test_points_of_a_cluster_move_together():
    """Two clusters: distances within a cluster shrink, compared with those between clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 1, 50, generator=generator).repeat_interleave(10, dim=1).flatten(0, 1)
    noisy = (centres + 1.5 * torch.randn(20, 50, generator=generator))[None]

    def ratio(h_1MF):
        distance = torch.cdist(h_1MF[0], h_1MF[0])
        return distance[:10, :10].mean() / distance[:10, 10:].mean()

    assert ratio(diffuse_features(noisy, 0.7)) < 0.8 * ratio(diffuse_features(noisy, 0.0))


def test_two_points_and_equal_points_give_numbers():
    two = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1))
    assert diffuse_features(two, 0.9).isfinite().all()
    assert diffuse_features(torch.ones(1, 4, 5), 0.9).isfinite().all()
