"""A VAE without episodic training (`train.prior = "normal"`): the prior of the latents is N(0, I)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy.stats import multivariate_normal
from small_model import B, M, batch, model, settings
from torch import Tensor

from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.meta_gmvae import sample_latents
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.objectives.elbo import lower_bound, standard_normal


def test_standard_normal_is_a_mixture_of_one_component() -> None:
    z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = multivariate_normal(np.zeros(4), np.eye(4)).logpdf(z.numpy())
    assert standard_normal(z).log_prob(z).numpy() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_loss_of_a_step_equals_the_transcription(beta: float) -> None:
    """Reconstruction and Monte Carlo KL divergence from N(0, I), in plain loops."""
    net, sets = model(), batch()
    loss, terms = MetaStep(net, settings(prior="normal", seed=5, beta=beta)).eval()(sets)
    weights, means = np.ones(1), np.zeros((1, 2))
    reconstructions, divergences = [], []
    for b, episode in enumerate(sets.episodes):
        noise = torch.randn(M, 4, 2, generator=keyed_generator(torch.device("cpu"), 5, "meta", int(episode)))
        x = torch.tensor(sets.images[b]).double() / 255
        with torch.no_grad():
            mean, log_variance = (part[0] for part in net.posterior(net.encode_images(x)[None]))
            z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise
            p = torch.sigmoid(net.decode(z[:, :1].flatten(0, 1))).numpy()
        for j in range(M):
            reconstructions.append(reference.bernoulli_log_likelihood(x[j].numpy(), p[j]))
            variance = log_variance[j].exp().numpy()
            kl = 0.0
            for n in range(4):
                kl += reference.gaussian_log_density(z[j, n].numpy(), mean[j].numpy(), variance)
                kl -= reference.mixture_log_density(z[j, n].numpy(), weights, means)
            divergences.append(kl / 4)
    expected = -(sum(reconstructions) - beta * sum(divergences)) / B  # sum over the points of an episode
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-8)
    assert float(terms["prior"] + terms["entropy"]) == pytest.approx(-np.mean(divergences), rel=1e-8)


def test_divergence_is_the_closed_form_in_expectation() -> None:
    """KL(N(mu, diag s^2) || N(0, I)) = 1/2 sum_d (mu_d^2 + s_d^2 - 1 - log s_d^2) of each point."""
    rng = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(1, 3, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(1, 3, 200_000, 2, generator=rng, dtype=torch.float64)
    z = sample_latents(mean, log_variance, noise)
    x = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    terms = lower_bound(x, x, z, noise, log_variance, standard_normal(z.flatten(1, 2)))
    expected = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=2)
    assert torch.allclose(-(terms.prior + terms.entropy), expected, rtol=0, atol=0.02)
    assert torch.allclose(terms.reconstruction, torch.full((1, 3), -4 * math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
def test_gradient_of_a_step_equals_finite_differences(reconstruct: str) -> None:
    net, sets = model(reconstruct=reconstruct), batch()
    if reconstruct == "features":
        rng = np.random.default_rng(0)
        sets = type(sets)(rng.normal(size=(B, M, net.feature_dim)), sets.episodes, sets.step)
    step = MetaStep(net, settings(prior="normal", decode_samples=2)).eval()
    step(sets)[0].backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    start = {name: p.detach().clone() for name, p in trained.items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in start.items()}

        def value(h: float, direction: dict[str, Tensor] = direction) -> float:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(start[name] + h * direction[name])
                return float(step(sets)[0])

        numeric = (value(1e-6) - value(-1e-6)) / 2e-6
        analytic = sum(float((trained[name].grad * direction[name]).sum()) for name in start)  # type: ignore[operator]
        assert analytic == pytest.approx(numeric, rel=2e-5)


def test_equal_points_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """EM needs as many different points as components; N(0, I) needs none."""
    net: Any = model()
    monkeypatch.setattr(
        net, "posterior", lambda h: (torch.zeros(B, M, 2).double(), torch.full((B, M, 2), -1e9).double())
    )
    step = MetaStep(net, settings(prior="normal")).eval()
    loss, _ = step(batch())
    step.explain_failure()
    assert not torch.isnan(loss)
    assert torch.isnan(MetaStep(net, settings()).eval()(batch())[0])
