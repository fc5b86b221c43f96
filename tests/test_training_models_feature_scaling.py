"""Scaling of features: standardisation and half-whitening against NumPy."""

from __future__ import annotations

import numpy as np
import torch

from metagmvae.training.models.feature_scaling import (
    FeatureScale,
    FeatureWhitening,
    ViewWhitening,
)


def test_feature_scale_standardises_and_normalises() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 10
    h[:, 2] = 3.0  # a constant dimension
    scale = FeatureScale(6).double()
    scale.set_statistics(h.mean(dim=0), h.std(dim=0))
    scaled = scale(h)
    std = h.numpy().std(axis=0, ddof=1)
    std[2] = 1.0
    centred = (h.numpy() - h.numpy().mean(axis=0)) / std
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True) * np.sqrt(6)
    assert np.allclose(scaled.numpy(), expected, rtol=0, atol=1e-12)
    assert torch.allclose(scaled.square().sum(dim=1), torch.full((50,), 6.0).double())
    assert set(scale.state_dict()) == {"mean", "deviation"}  # stored with the model


def test_feature_whitening_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    h = rng.gamma(0.5, size=(400, 6)) @ rng.normal(size=(6, 6))
    h[:, 2] = 0.0  # a constant dimension
    scale = FeatureWhitening(6).double()
    transformed = FeatureWhitening.transform(torch.from_numpy(h))
    scale.set_statistics(transformed.mean(dim=0), torch.cov(transformed.T))

    rows = []
    for row in h:
        root = np.array([np.sign(v) * np.sqrt(abs(v)) for v in row])
        rows.append(root / np.sqrt((root**2).sum()))
    u = np.stack(rows)
    # By a singular value decomposition of the data, where the module decomposes the covariance.
    _, singular, axes = np.linalg.svd(u - u.mean(axis=0))
    std = singular / np.sqrt(len(u) - 1)
    whitening = axes.T @ np.diag(1 / np.sqrt(std + 1e-3 * std.max())) @ axes
    expected = (u - u.mean(axis=0)) @ whitening
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True) * np.sqrt(6)

    scaled = scale(torch.from_numpy(h))
    assert np.allclose(scaled.numpy(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(scaled.square().sum(dim=1), torch.full((400,), 6.0).double())
    assert set(scale.state_dict()) == {"mean", "whitening"}  # stored with the model


def test_view_whitening_equals_numpy() -> None:
    rng = np.random.default_rng(2)
    h, views = rng.normal(size=(40, 6)) + 1.0, rng.normal(size=(40, 2, 6)) * np.arange(1, 7)
    within = np.zeros((6, 6))
    for first, second in views:
        for view in (first, second):
            deviation = view - (first + second) / 2
            within += np.outer(deviation, deviation) / 40
    unit = np.stack([row / np.sqrt((row**2).sum()) for row in h])
    scale = ViewWhitening(6).double()
    scale.set_statistics(torch.from_numpy(unit.mean(axis=0)), torch.from_numpy(within))

    variance, axes = np.linalg.eigh(within)
    std = np.sqrt(variance)
    expected = (unit - unit.mean(axis=0)) @ axes @ np.diag(1 / np.sqrt(std + 1e-3 * std.max())) @ axes.T
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True) * np.sqrt(6)
    assert np.allclose(scale(torch.from_numpy(h)).numpy(), expected, rtol=0, atol=1e-9)
    # The length of a feature vector means nothing.
    assert np.allclose(scale(torch.from_numpy(3 * h)).numpy(), expected, rtol=0, atol=1e-9)
    assert set(scale.state_dict()) == {"mean", "whitening"}  # stored with the model


def test_half_whitening_leaves_the_square_root_of_each_standard_deviation() -> None:
    rng = np.random.default_rng(1)
    u = rng.normal(size=(5000, 4)) @ np.diag([1.0, 0.5, 0.1, 0.02])
    scale = FeatureWhitening(4).double()
    scale.set_statistics(torch.zeros(4), torch.cov(torch.from_numpy(u).T))
    after = (torch.from_numpy(u) @ scale.whitening).std(dim=0)
    expected = np.sqrt(u.std(axis=0, ddof=1))
    assert np.allclose(after.numpy(), expected, rtol=0.05)


def test_constant_features_stay_finite() -> None:
    scale = FeatureWhitening(3)
    scale.set_statistics(torch.full((3,), 3**-0.5), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.isfinite(scale(torch.ones(2, 3))).all()
