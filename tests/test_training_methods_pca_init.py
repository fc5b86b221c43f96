"""PCA initialisation: posterior and decoder equal scikit-learn's probabilistic PCA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.training.methods.frozen_features import ScaledRows, fit_feature_scaling, init_from_features
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.feature_scaling import FLOOR
from metagmvae.training.trainer.builders import build_model

ROWS, SIZE, LATENT = 300, 32, 6


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(ROWS, SIZE)) @ rng.normal(size=(SIZE, SIZE)) + 3).astype(np.float32)


def initialised(**settings: object) -> tuple[MetaGMVAE, np.ndarray]:
    """A model initialised by PCA of its training features, and these features, scaled."""
    options = {"channels": 8, "latent": LATENT, "reconstruct": "features", "width": 16, **settings}
    model = build_model(ModelSettings.model_validate(options), (1, 28, 28), 0)
    fit_feature_scaling(model, rows())
    scaled = ScaledRows(rows(), model.scale)
    init_from_features(model, scaled)
    return model, scaled[np.arange(ROWS)]


@pytest.mark.parametrize("features", ["standard", "whitened"])
@pytest.mark.parametrize(
    ("width", "layers", "posterior"), [(16, 2, "diagonal"), (SIZE, 1, "isotropic"), (64, 0, "diagonal")]
)
@torch.no_grad()
def test_latents_are_the_leading_components_over_the_discarded_standard_deviation(
    features: str, width: int, layers: int, posterior: str
) -> None:
    model, x = initialised(features=features, width=width, layers=layers, posterior=posterior)
    pca = PCA(LATENT, svd_solver="full").fit(x.astype(np.float64))
    expected = pca.transform(x) / np.sqrt(pca.noise_variance_)
    mean, log_variance = model.posterior(torch.from_numpy(x)[None])
    signs = np.sign((mean[0].numpy() * expected).sum(axis=0))
    assert np.allclose(mean[0].numpy() * signs, expected, atol=2e-3)
    assert torch.equal(log_variance, torch.zeros_like(log_variance))
    reconstructed = pca.inverse_transform(pca.transform(x))
    assert np.allclose(model.decode(mean[0]).numpy(), reconstructed, atol=2e-3)


@torch.no_grad()
def test_raw_features_are_decoded_through_the_final_relu() -> None:
    model, x = initialised(features="raw")
    pca = PCA(LATENT, svd_solver="full").fit(x.astype(np.float64))
    decoded = model.decode(model.posterior(torch.from_numpy(x)[None])[0][0]).numpy()
    assert np.allclose(decoded, np.maximum(pca.inverse_transform(pca.transform(x)), 0), atol=5e-3)


@torch.no_grad()
def test_latents_beyond_the_feature_size_are_unused() -> None:
    model, x = initialised(latent=48, width=64)
    mean, _ = model.posterior(torch.from_numpy(x)[None])
    assert np.linalg.matrix_rank(mean[0].numpy(), tol=1e-3) <= SIZE
    assert np.allclose(model.decode(mean[0]).numpy(), x, atol=5e-3)


def test_initialisation_is_deterministic_and_every_layer_has_a_gradient() -> None:
    (first, x), (second, _) = initialised(layers=2), initialised(layers=2)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    # The signs of eigenvectors are free: the largest entry of each is positive.
    assert isinstance(first.inlet, torch.nn.Linear)
    weight = first.inlet.weight.detach()
    assert (weight.gather(1, weight.abs().argmax(dim=1, keepdim=True)) > 0).all()
    mean, log_variance = first.posterior(torch.from_numpy(x)[None])
    (first.decode(mean[0]).square().sum() + mean.pow(3).sum() + log_variance.pow(2).sum()).backward()
    for block in first.attention.blocks:
        for layer in (block.output, block.outer):
            assert isinstance(layer, torch.nn.Linear)
            assert layer.weight.grad is not None
            assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("images", [1, 4])
@torch.no_grad()
def test_latents_stay_finite_with_fewer_images_than_dimensions(images: int) -> None:
    model = build_model(ModelSettings(channels=8, latent=LATENT, reconstruct="features", width=16), (1, 28, 28), 0)
    fit_feature_scaling(model, rows()[:images])
    scaled = ScaledRows(rows()[:images], model.scale)
    init_from_features(model, scaled)
    x = torch.from_numpy(scaled[np.arange(images)])
    mean, _ = model.posterior(x[None])
    assert mean.abs().max() <= 1 / FLOOR * images
    assert torch.allclose(model.decode(mean[0]), x, atol=1e-2)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({}, "model.reconstruct"),
        ({"reconstruct": "features", "attention_block": "set-attention"}, "model.attention_block"),
        ({"reconstruct": "features", "latent": 300, "width": 512}, "model.latent"),
        ({"reconstruct": "features", "latent": 128, "width": 64}, "model.latent"),
    ],
)
def test_settings_without_room_for_pca_are_refused(model: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings.model_validate({"model": model, "train": {"start": "components"}})
