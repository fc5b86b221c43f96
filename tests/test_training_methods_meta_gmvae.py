"""The posterior q(z | x, D) of Eq. 5: permutation-equivariant, independent of other sets, sizes of Table 3."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.methods.meta_gmvae import MetaGMVAE, inductive_noise, latent_noise, sample_latents
from metagmvae.training.objectives.class_whitening import whiten_classes
from metagmvae.training.objectives.feature_diffusion import diffuse_features


def tiny(**settings: Any) -> MetaGMVAE:
    torch.manual_seed(0)
    sizes = {"latent": 3, "channels": 4, "width": 8, "heads": 2, "layers": 2}
    return MetaGMVAE(ModelSettings(**{**sizes, **settings}), (1, 8, 8)).double().eval()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_block": "set-attention", "attention_scale": "model", "attention_activation": "relu"},
    {"posterior": "isotropic"},
    {"layers": 0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_posterior_is_permutation_equivariant_and_independent_of_other_sets(settings: dict[str, Any]) -> None:
    model = tiny(**settings)
    x = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64)

    def posterior(sets: torch.Tensor) -> torch.Tensor:
        h = model.encode_images(sets.flatten(0, 1)).unflatten(0, sets.shape[:2])
        return torch.cat(model.posterior(h), dim=-1)

    together = posterior(x)
    order = torch.randperm(6)
    assert torch.allclose(posterior(x[:, order]), together[:, order], rtol=0, atol=1e-13)
    for b in range(2):
        assert torch.allclose(posterior(x[b : b + 1])[0], together[b], rtol=0, atol=1e-13)
    changed = x.clone()
    changed[0, 0] = 1 - changed[0, 0]
    differs = (posterior(changed) - together).abs().sum(dim=-1) > 1e-12
    # Changing one image changes the posterior of its whole set (without attention, of itself), and of no other set.
    assert differs[0].all() if settings.get("layers", 2) else differs[0].tolist() == [True] + [False] * 5
    assert not differs[1].any()


def test_posterior_is_affine_in_the_set_encoding() -> None:
    """mu_j = W_mu H_j + b_mu, log sigma^2_j = W H_j + b (Eq. 5)."""
    model = tiny()
    h = torch.randn(2, 5, model.encoder.feature_dim, dtype=torch.float64)
    mean, log_variance = model.posterior(h)
    encoding = model.attention(model.inlet(h))
    weight, bias = model.head.weight, model.head.bias
    assert torch.allclose(mean, encoding @ weight[:3].T + bias[:3], atol=1e-13)
    assert torch.allclose(log_variance, encoding @ weight[3:].T + bias[3:], atol=1e-13)


def test_isotropic_posterior_has_one_variance_per_point() -> None:
    mean, log_variance = tiny(posterior="isotropic").posterior(torch.randn(2, 5, 4).double())
    assert mean.shape == log_variance.shape == (2, 5, 3)
    assert torch.equal(log_variance, log_variance[..., :1].expand(2, 5, 3))


def test_sizes_of_table_3() -> None:
    model = MetaGMVAE(ModelSettings(), (1, 28, 28))
    assert isinstance(model.inlet, torch.nn.Identity)  # F = 256 is the width already
    assert (model.head.in_features, model.head.out_features) == (256, 128)
    h = model.encode_images(torch.rand(10, 1, 28, 28))
    mean, log_variance = model.posterior(h.view(2, 5, 256))
    assert mean.shape == log_variance.shape == (2, 5, 64)
    assert model.decode(mean[0]).shape == (5, 1, 28, 28)


def test_other_image_sizes_get_an_input_projection() -> None:
    model = MetaGMVAE(ModelSettings(channels=64, width=256), (3, 84, 84))
    assert isinstance(model.inlet, torch.nn.Linear)
    mean, _ = model.posterior(model.encode_images(torch.rand(4, 3, 84, 84))[None])
    assert mean.shape == (1, 4, 64)


def test_raw_features_of_a_rectified_encoder_are_decoded_through_a_relu() -> None:
    for settings in ({"features": "raw"}, {"features": "raw", "rectified": False}, {"features": "standard"}):
        last = tiny(reconstruct="features", **settings).decoder.mlp[-1]  # type: ignore[union-attr,index]
        assert isinstance(last, torch.nn.ReLU) == (settings == {"features": "raw"})


def test_scale_images_is_exact() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = MetaGMVAE.scale_images(levels)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, torch.arange(256.0) / 255)


def test_samples_are_mean_plus_sigma_times_noise() -> None:
    mean, log_variance = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    noise = torch.randn(2, 3, 5, 4)
    z = sample_latents(mean, log_variance, noise)
    for n in range(5):
        assert torch.allclose(z[:, :, n], mean + log_variance.exp().sqrt() * noise[:, :, n], atol=1e-6)


def test_samples_follow_the_posterior() -> None:
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, log_variance = torch.tensor([1.5]).double(), torch.tensor([np.log(0.25)]).double()
    z = sample_latents(mean, log_variance, noise)
    assert kstest(z[:, 0].numpy(), "norm", args=(1.5, 0.5)).pvalue > 1e-3


def test_support_images_of_an_inductive_set_share_their_noise_and_the_query_has_its_own() -> None:
    model, adapt, device = tiny(), AdaptSettings(samples=4), torch.device("cpu")
    drawn = latent_noise(model, adapt, 4, 7, device)
    assert torch.equal(inductive_noise(model, adapt, 3, 7, device), drawn[[0, 0, 0, 3]])
    assert len(drawn.unique()) == drawn.numel()


@pytest.mark.parametrize("background", [None, -8.0])
@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
def test_inductive_mode_on_features_is_a_gaussian_of_the_support_features(
    covariance: str, background: float | None
) -> None:
    """Of unequal shots, against plain loops; it depends neither on the latents nor on the other queries."""
    model = tiny()
    adapt = AdaptSettings.model_validate(
        {"inductive": "features", "e_step": covariance, "final_covariance": covariance, "temperature": 3.0}
    )
    rng = np.random.default_rng(0)
    labels = [0, 1, 0, 1, 2, 2, 2]
    support, queries = rng.normal(size=(7, model.feature_dim)), rng.normal(size=(4, model.feature_dim))
    options: dict[str, Any] = {"mode": "inductive", "seed_by_episode": [0], "background": background}
    given = torch.from_numpy(support)[None], torch.tensor(labels), torch.from_numpy(queries)[None]
    log_p_PK = model.log_posteriors(adapt, *given, **options)[0]
    for query, log_p_K in zip(queries, log_p_PK, strict=True):
        logits = []
        for k in range(3):
            rows = [support[i] for i in range(7) if labels[i] == k]
            mean = sum(rows) / len(rows)
            variance = sum((row - mean) ** 2 for row in rows) / len(rows)
            variance = variance if covariance == "diagonal" else np.ones_like(mean)
            logits.append(-0.5 * sum((query - mean) ** 2 / variance + np.log(variance)) / 3.0)
        logits += [] if background is None else [background]
        expected = np.array(logits) - np.logaddexp.reduce(logits)
        assert np.allclose(log_p_K.numpy(), expected, rtol=1e-3, atol=1e-6)
    alone = model.log_posteriors(adapt, *given[:2], given[2][:, 2:3], **options)[0, 0]
    assert torch.allclose(alone, log_p_PK[2])
    with torch.no_grad():
        model.head.weight.mul_(-2)
    assert torch.equal(model.log_posteriors(adapt, *given, **options)[0], log_p_PK)
    other = model.log_posteriors(adapt.model_copy(update={"inductive": "latents"}), *given, **options)
    assert not torch.allclose(other[0], log_p_PK)


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_diffusion_moves_the_features_of_transductive_episodes_only(mode: str) -> None:
    model = tiny(reconstruct="features")
    h_EMF = torch.randn(2, 9, model.feature_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label_T = torch.tensor([0, 1, 2, 1])

    def answer(sets: torch.Tensor, diffusion: float) -> torch.Tensor:
        adapt = AdaptSettings(samples=2, diffusion=diffusion)
        options: dict[str, Any] = {"mode": mode, "seed_by_episode": [3, 4]}
        return model.log_posteriors(adapt, sets[:, :4], label_T, sets[:, 4:], **options)

    moved = diffuse_features(h_EMF, 0.6) if mode == "transductive" else h_EMF
    assert torch.allclose(answer(h_EMF, 0.6), answer(moved, 0.0), atol=1e-12)
    assert torch.allclose(answer(h_EMF, 0.6), answer(h_EMF, 0.0)) == (mode == "inductive")


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
@pytest.mark.parametrize("space", ["latents", "features"])
def test_whitening_changes_the_features_of_both_modes(mode: str, space: Literal["latents", "features"]) -> None:
    model = tiny(reconstruct="features")
    h_EMF = torch.randn(2, 9, model.feature_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label_T = torch.tensor([0, 1, 2, 1])

    def answer(support: torch.Tensor, queries: torch.Tensor, whitening: float) -> torch.Tensor:
        adapt = AdaptSettings(samples=2, whitening=whitening, inductive=space)
        options: dict[str, Any] = {"mode": mode, "seed_by_episode": [3, 4]}
        return model.log_posteriors(adapt, support, label_T, queries, **options)

    support, queries = h_EMF[:, :4], h_EMF[:, 4:]
    whitened = answer(*whiten_classes(support, label_T, queries, 2.0), 0.0)
    torch.testing.assert_close(answer(support, queries, 2.0), whitened)
    assert not torch.allclose(whitened, answer(support, queries, 0.0))


@pytest.mark.parametrize("key", ["diffusion", "whitening"])
@pytest.mark.parametrize("settings", [{}, {"reconstruct": "features", "features": "raw"}])
def test_diffusion_and_whitening_are_refused_for_features_without_scaling(key: str, settings: dict[str, Any]) -> None:
    model = tiny(**settings)
    h_EMF = torch.randn(1, 5, model.feature_dim).double()
    with pytest.raises(DataError, match=rf"adapt.{key} \(0.5\): the model has no scaled features"):
        model.log_posteriors(
            AdaptSettings.model_validate({key: 0.5}),
            h_EMF[:, :2],
            torch.tensor([0, 1]),
            h_EMF[:, 2:],
            mode="transductive",
            seed_by_episode=[0],
        )
