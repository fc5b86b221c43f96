"""Scaling of frozen features: the statistics of all training rows, for any chunk size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import ModelSettings
from metagmvae.training.methods import frozen_features
from metagmvae.training.methods.frozen_features import ScaledRows, fit_feature_scaling
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening, ViewWhitening
from metagmvae.training.trainer.builders import build_model

ROWS, SIZE = 50, 32


def rows() -> np.ndarray:
    return np.random.default_rng(0).gamma(0.5, size=(ROWS, SIZE)).astype(np.float32)


def model(features: str) -> MetaGMVAE:
    settings = {"channels": 8, "width": SIZE, "latent": 6, "reconstruct": "features", "features": features}
    return build_model(ModelSettings.model_validate(settings), (1, 28, 28), 0)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_statistics_equal_those_of_all_rows(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(frozen_features, "CHUNK", chunk)
    raw = rows()
    standard = model("standard")
    assert isinstance(standard.scale, FeatureScale)
    fit_feature_scaling(standard, raw)
    assert np.allclose(standard.scale.mean.numpy(), raw.mean(axis=0), atol=1e-6)
    assert np.allclose(standard.scale.deviation.numpy(), raw.std(axis=0, ddof=1), atol=1e-6)

    whitened = model("whitened")
    assert isinstance(whitened.scale, FeatureWhitening)
    fit_feature_scaling(whitened, raw)
    expected = FeatureWhitening(SIZE)
    transformed = FeatureWhitening.transform(torch.from_numpy(raw).double())
    expected.set_statistics(transformed.mean(dim=0), torch.cov(transformed.T))
    assert torch.allclose(whitened.scale.mean, expected.mean, atol=1e-6)
    assert torch.allclose(whitened.scale.whitening, expected.whitening, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("limit", "chunk"), [(1024, 1024), (20, 7)])
def test_view_whitening_uses_the_covariance_within_images(
    monkeypatch: pytest.MonkeyPatch, limit: int, chunk: int
) -> None:
    """The two views of an image are the image itself and a random one; of the first images where there are many."""
    monkeypatch.setattr(frozen_features, "CHUNK", chunk)
    monkeypatch.setattr(frozen_features, "VIEW_IMAGES", limit)
    raw, views = rows(), np.random.default_rng(1).normal(size=(ROWS, SIZE)).astype(np.float32)
    counts: list[int] = []

    def encode_views(count: int) -> np.ndarray:
        counts.append(count)
        return views[:count]

    net = model("view-whitened")
    assert isinstance(net.scale, ViewWhitening)
    fit_feature_scaling(net, raw, encode_views)
    count = min(limit, ROWS)
    assert counts == [count]
    unit, unit_views = (h.astype(np.float64) / np.linalg.norm(h, axis=1, keepdims=True) for h in (raw, views))
    within = np.zeros((SIZE, SIZE))
    for first, second in zip(unit[:count], unit_views[:count], strict=True):
        for view in (first, second):
            within += np.outer(view - (first + second) / 2, view - (first + second) / 2) / count
    expected = ViewWhitening(SIZE)
    expected.set_statistics(torch.from_numpy(unit.mean(axis=0)), torch.from_numpy(within))
    assert torch.allclose(net.scale.mean, expected.mean, atol=1e-6)
    assert torch.allclose(net.scale.whitening, expected.whitening, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("features", ["standard", "whitened"])
def test_rows_are_scaled_as_in_the_model(features: str) -> None:
    raw, net = rows(), model(features)
    fit_feature_scaling(net, raw)
    scaled = ScaledRows(raw, net.scale)[np.array([3, 1])]
    assert np.allclose(scaled, net.scale_features(torch.from_numpy(raw[[3, 1]])).numpy())
    assert np.allclose((scaled**2).sum(axis=1), SIZE, rtol=1e-4)


def test_raw_features_are_not_scaled() -> None:
    net = model("raw")
    fit_feature_scaling(net, rows())
    assert torch.equal(net.scale_features(torch.ones(2, SIZE)), torch.ones(2, SIZE))
