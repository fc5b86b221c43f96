"""The lower bound (Eq. 3) and the objective (Eq. 9) against their literal transcriptions; decoding R of N samples."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from metagmvae.training.methods.meta_gmvae import sample_latents
from metagmvae.training.objectives.elbo import (
    CALIBRATION_FLOOR,
    ElboTerms,
    Likelihood,
    bernoulli_log_prob,
    calibrated_log_prob,
    fixed_variance_log_prob,
    gaussian_log_prob,
    lower_bound,
    objective,
)
from metagmvae.training.objectives.mixture import Mixture, fit_mixture

B, M, N, K, D = 2, 5, 4, 3, 2
ROWS = torch.tensor([[0, 7, 13], [19, 4, 10]])
"""Indices of the samples at which EM starts, of M * N per episode."""


class Problem:
    """A decoder, posteriors and noise small enough for plain loops, float64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        torch.manual_seed(seed)
        layers = [nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 4), nn.Unflatten(1, (1, 2, 2))]
        self.decode = nn.Sequential(*layers).double()
        self.x = torch.rand(B * M, 1, 2, 2, generator=generator, dtype=torch.float64)
        self.mean = normal(B, M, D).requires_grad_()
        self.log_variance = (0.5 * normal(B, M, D)).requires_grad_()
        self.noise = normal(B, M, N, D)

    def loss(self, decoded: int, scale: str, order: tuple[int, ...] = tuple(range(N))) -> Tensor:
        """The negative objective with the samples of every data point in another order.

        EM starts from the same samples in any order.
        """
        noise = self.noise[:, :, list(order)]
        position_of = {n: position for position, n in enumerate(order)}
        rows = torch.tensor([[int(r) // N * N + position_of[int(r) % N] for r in row] for row in ROWS])
        z = sample_latents(self.mean, self.log_variance, noise)
        mixture = fit_mixture(z.flatten(1, 2), rows, 3)
        logits = self.decode(z[:, :, :decoded].flatten(0, 2))
        return -objective(lower_bound(self.x, logits, z, noise, self.log_variance, mixture), scale)

    def gradient(self, loss: Tensor) -> Tensor:
        leaves = [self.mean, self.log_variance, *self.decode.parameters()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("decoded", [1, 2, N])
def test_objective_equals_the_transcription(scale: str, decoded: int) -> None:
    problem = Problem()
    z = sample_latents(problem.mean, problem.log_variance, problem.noise).detach()
    probability = torch.sigmoid(problem.decode(z[:, :, :decoded].flatten(0, 2))).detach()
    elbos = []
    for b in range(B):
        weights, means = reference.em(z[b].flatten(0, 1).numpy(), ROWS[b].tolist(), 3)
        elbos.append(
            reference.elbo(
                problem.x.view(B, M, 4)[b].numpy(),
                probability.view(B, M, decoded, 4)[b].numpy(),
                z[b].numpy(),
                problem.mean[b].detach().numpy(),
                problem.log_variance[b].detach().exp().numpy(),
                weights,
                means,
                scale,
            )
        )
    expected = -reference.batch_objective(elbos)
    assert float(problem.loss(decoded, scale).detach()) == pytest.approx(expected, rel=1e-11)


def test_terms_equal_those_of_eq_3() -> None:
    problem = Problem(1)
    z = sample_latents(problem.mean, problem.log_variance, problem.noise).detach()
    mixture = fit_mixture(z.flatten(1, 2), ROWS, 2)
    logits = problem.decode(z.flatten(0, 2)).detach()
    terms = lower_bound(problem.x, logits, z, problem.noise, problem.log_variance, mixture)
    assert terms.reconstruction.shape == terms.prior.shape == terms.entropy.shape == (B, M)
    x, p = problem.x.view(B, M, 4).numpy(), torch.sigmoid(logits).view(B, M, N, 4).numpy()
    variance = problem.log_variance.detach().exp().numpy()
    for b in range(B):
        weights, means = mixture.log_weight_EK[b].exp().numpy(), mixture.mean_EKD[b].numpy()
        for j in range(M):
            decoded = [reference.bernoulli_log_likelihood(x[b, j], p[b, j, n]) for n in range(N)]
            prior = [reference.mixture_log_density(point, weights, means) for point in z[b, j].numpy()]
            centre = problem.mean[b, j].detach().numpy()
            log_q = [reference.gaussian_log_density(point, centre, variance[b, j]) for point in z[b, j].numpy()]
            assert float(terms.reconstruction[b, j]) == pytest.approx(np.mean(decoded), rel=1e-11)
            assert float(terms.prior[b, j]) == pytest.approx(np.mean(prior), rel=1e-11)
            assert float(terms.entropy[b, j].detach()) == pytest.approx(-np.mean(log_q), rel=1e-11)
    assert torch.equal(terms.elbo, terms.reconstruction + terms.prior + terms.entropy)


@pytest.mark.parametrize("beta", [0.25, 1.0, 3.0])
def test_beta_multiplies_the_kl_divergence_only(beta: float) -> None:
    problem = Problem(6)
    z = sample_latents(problem.mean, problem.log_variance, problem.noise)
    mixture = fit_mixture(z.detach().flatten(1, 2), ROWS, 2)
    bound = lower_bound(problem.x, problem.decode(z.flatten(0, 2)), z, problem.noise, problem.log_variance, mixture)
    terms = ElboTerms(*(term.detach() for term in bound))
    expected = 0.0
    for b in range(B):
        for j in range(M):
            kl = -float(terms.prior[b, j]) - float(terms.entropy[b, j])
            expected += (float(terms.reconstruction[b, j]) - beta * kl) / B
    assert float(objective(terms, "sum", beta)) == pytest.approx(expected, rel=1e-12)
    assert float(objective(terms, "mean", beta)) == pytest.approx(expected / M, rel=1e-12)
    assert float(objective(terms, "sum")) == pytest.approx(float(terms.elbo.sum(dim=1).mean()), rel=1e-12)


@pytest.mark.parametrize("decoded", [1, 2, 3])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_decoding_fewer_samples_keeps_the_expectation_and_its_gradient(decoded: int, scale: str) -> None:
    """The N samples of a data point are exchangeable: all N! orders of a draw are equally likely. The mean of the
    objective with R decoded samples over all orders, and of its gradient, equals the one with all N decoded, exactly,
    for every draw, hence in expectation."""
    problem = Problem(2)
    losses = [problem.loss(decoded, scale, order) for order in permutations(range(N))]
    all_decoded = problem.loss(N, scale)
    spread = torch.stack(losses).detach().std()
    assert spread > 1e-3  # a single order is another estimate
    mean = torch.stack(losses).mean()
    assert float(mean.detach()) == pytest.approx(float(all_decoded.detach()), rel=1e-12)
    assert torch.allclose(problem.gradient(mean), problem.gradient(all_decoded), rtol=1e-9, atol=1e-11)


def test_order_of_samples_does_not_matter_if_all_are_decoded() -> None:
    problem = Problem(3)
    values = [float(problem.loss(N, "sum", order).detach()) for order in permutations(range(N))]
    assert np.allclose(values, values[0], rtol=1e-12)


def test_gradient_equals_finite_differences_with_psi_fixed() -> None:
    """gradcheck over means, log variances and all decoder weights, with psi* fixed (it is a constant of Eq. 9)."""
    problem = Problem(4)
    start = sample_latents(problem.mean, problem.log_variance, problem.noise).detach()
    mixture = fit_mixture(start.flatten(1, 2), ROWS, 3)
    names = [name for name, _ in problem.decode.named_parameters()]

    def loss(mean: Tensor, log_variance: Tensor, *weights: Tensor) -> Tensor:
        z = sample_latents(mean, log_variance, problem.noise)
        weights_by_name = dict(zip(names, weights, strict=True))
        logits = torch.func.functional_call(problem.decode, weights_by_name, (z[:, :, :2].flatten(0, 2),))
        return objective(lower_bound(problem.x, logits, z, problem.noise, log_variance, mixture), "sum")

    leaves = (problem.mean, problem.log_variance, *problem.decode.parameters())
    assert torch.autograd.gradcheck(loss, leaves)


def test_gradient_does_not_flow_through_em() -> None:
    """After one EM iteration psi still depends on z, so the total derivative differs from ours. After convergence both
    agree, because psi* maximises the objective (Eq. 8)."""

    def derivatives(iterations: int) -> tuple[float, float]:
        problem = Problem(5)
        direction = torch.randn(B, M, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def value(step: float) -> Tensor:
            mean = problem.mean + step * direction
            z = sample_latents(mean, problem.log_variance, problem.noise)
            mixture = fit_mixture(z.detach().flatten(1, 2), ROWS, iterations)
            logits = problem.decode(z.flatten(0, 2))
            terms = lower_bound(problem.x, logits, z, problem.noise, problem.log_variance, mixture)
            return objective(terms, "sum")

        step = 1e-5
        total = float(value(step).detach() - value(-step).detach()) / (2 * step)
        (gradient,) = torch.autograd.grad(value(0.0), problem.mean)
        return total, float((gradient * direction).sum())

    total, partial = derivatives(1)
    assert abs(total - partial) > 1e-3
    total, partial = derivatives(3000)
    assert total == pytest.approx(partial, abs=1e-6)


def test_bernoulli_log_prob_equals_the_transcription_and_is_finite_for_extreme_logits() -> None:
    x, logits = torch.rand(3, 1, 4, 4).double(), 3 * torch.randn(3, 1, 4, 4).double()
    ours = bernoulli_log_prob(x, logits)
    for i in range(3):
        expected = reference.bernoulli_log_likelihood(x[i].numpy(), torch.sigmoid(logits[i]).numpy())
        assert float(ours[i]) == pytest.approx(expected, rel=1e-12)
    extreme = bernoulli_log_prob(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[200.0, -200.0, -200.0]]))
    assert float(extreme) == pytest.approx(-200.0)
    assert bernoulli_log_prob(torch.ones(1, 2), torch.zeros(1, 2).bfloat16()).dtype == torch.float32


def test_gaussian_log_prob_equals_the_density_at_the_sample() -> None:
    rng = np.random.default_rng(0)
    mean, log_variance, noise = rng.normal(size=3), rng.normal(size=3), rng.normal(size=3)
    z = mean + np.exp(0.5 * log_variance) * noise
    ours = gaussian_log_prob(torch.tensor(noise), torch.tensor(log_variance))
    expected = reference.gaussian_log_density(z, mean, np.exp(log_variance))
    assert float(ours) == pytest.approx(expected, rel=1e-12)


def test_prior_and_entropy_cancel_if_posterior_equals_prior() -> None:
    """If q equals the prior, prior + entropy is zero for each sample and only the reconstruction is left."""
    noise = torch.randn(1, 4, 3, 2).double()
    mixture = Mixture(torch.zeros(1, 1, 2).double(), torch.zeros(1, 1).double())
    x, logits = torch.rand(4, 1, 2, 2).double(), torch.randn(4, 1, 2, 2).double()
    terms = lower_bound(x, logits, noise, noise, torch.zeros(1, 4, 2).double(), mixture)
    assert torch.allclose(terms.prior + terms.entropy, torch.zeros(1, 4).double(), atol=1e-14)
    assert torch.allclose(terms.elbo[0], bernoulli_log_prob(x, logits), atol=1e-13)


def test_sum_scale_is_m_times_mean_scale() -> None:
    problem = Problem(6)
    assert float(problem.loss(1, "sum").detach()) == pytest.approx(M * float(problem.loss(1, "mean").detach()))


def test_calibrated_variance_is_the_mean_squared_error_of_an_episode() -> None:
    x, mean = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    ours = calibrated_log_prob(x, mean)
    for b in range(2):
        errors = [float(x[b, p, f] - mean[b, p, f]) ** 2 for p in range(3) for f in range(5)]
        for p in range(3):
            variance = np.full(5, sum(errors) / 15)
            expected = reference.gaussian_log_density(x[b, p].numpy(), mean[b, p].numpy(), variance)
            assert float(ours[b, p]) == pytest.approx(expected, rel=1e-12)
    exact = torch.full((2, 3), -2.5 * np.log(2 * np.pi * CALIBRATION_FLOOR), dtype=torch.float64)
    torch.testing.assert_close(calibrated_log_prob(x, x), exact)


@pytest.mark.parametrize(("likelihood", "variance"), [("unit", 1.0), ("half", 0.5)])
def test_fixed_variances_give_the_gaussian_density_without_its_constant(
    likelihood: Likelihood, variance: float
) -> None:
    x, mean = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    ours = fixed_variance_log_prob(x, mean, variance)
    for b in range(2):
        for p in range(3):
            density = reference.gaussian_log_density(x[b, p].numpy(), mean[b, p].numpy(), np.full(5, variance))
            assert float(ours[b, p]) == pytest.approx(density + 2.5 * np.log(2 * np.pi * variance), rel=1e-12)
            error = reference.squared_error(x[b, p].numpy(), mean[b, p].numpy())
            assert float(ours[b, p]) == pytest.approx(-error if likelihood == "half" else -error / 2, rel=1e-12)
    z, noise = torch.randn(2, 3, 4, 2).double(), torch.randn(2, 3, 4, 2).double()
    mixture = Mixture(torch.zeros(2, 1, 2).double(), torch.zeros(2, 1).double())
    decoded = mean.repeat_interleave(2, dim=1)
    terms = lower_bound(x.flatten(0, 1), decoded.flatten(0, 1), z, noise, torch.zeros(2, 3, 2), mixture, likelihood)
    assert torch.allclose(terms.reconstruction, ours)
