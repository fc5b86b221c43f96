"""Scaling of frozen features: the statistics of all training rows, for any chunk size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import ModelSettings
from metagmvae.training.methods import frozen_features
from metagmvae.training.methods.frozen_features import ScaledRows, fit_feature_scaling
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening, power_transform
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
    transformed = power_transform(torch.from_numpy(raw).double())
    expected.set_statistics(transformed.mean(dim=0), torch.cov(transformed.T))
    assert torch.allclose(whitened.scale.mean, expected.mean, atol=1e-6)
    assert torch.allclose(whitened.scale.whitening, expected.whitening, rtol=1e-3, atol=1e-4)


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
