"""The literal transcriptions against SciPy and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import reference
from scipy.special import expit, logsumexp, softmax
from scipy.stats import bernoulli, multivariate_normal


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_gaussian_log_density_equals_scipy(rng: np.random.Generator) -> None:
    for size in (1, 3, 8):
        z, mean, variance = rng.normal(size=size), rng.normal(size=size), rng.uniform(0.1, 3, size=size)
        expected = multivariate_normal(mean, np.diag(variance)).logpdf(z)
        assert reference.gaussian_log_density(z, mean, variance) == pytest.approx(expected, rel=1e-12)


def test_mixture_log_density_equals_scipy(rng: np.random.Generator) -> None:
    means, weights, z = rng.normal(size=(4, 3)) * 3, rng.dirichlet(np.ones(4)), rng.normal(size=3)
    parts = [multivariate_normal(m, np.eye(3)).logpdf(z) for m in means]
    expected = logsumexp(parts, b=weights)
    assert reference.mixture_log_density(z, weights, means) == pytest.approx(expected, rel=1e-12)


def test_mixture_density_integrates_to_one() -> None:
    grid = np.linspace(-12, 12, 4001)
    means, weights = np.array([[-2.0], [3.0]]), np.array([0.3, 0.7])
    density = [math.exp(reference.mixture_log_density(np.array([v]), weights, means)) for v in grid]
    assert sum(density) * (grid[1] - grid[0]) == pytest.approx(1.0, abs=1e-9)


def test_e_step_equals_bayes_rule_in_matrix_form(rng: np.random.Generator) -> None:
    points, means, weights = rng.normal(size=(6, 2)), rng.normal(size=(3, 2)), rng.dirichlet(np.ones(3))
    logits = np.log(weights) - 0.5 * ((points[:, None] - means[None]) ** 2).sum(2)
    assert np.allclose(reference.em_e_step(points, weights, means), softmax(logits, axis=1), atol=1e-14)


def test_m_step_equals_weighted_averages(rng: np.random.Generator) -> None:
    points, q = rng.normal(size=(9, 2)), rng.dirichlet(np.ones(3), size=9)
    weights, means = reference.em_m_step(points, q)
    assert np.allclose(weights, q.mean(0), atol=1e-14)
    for k in range(3):
        assert np.allclose(means[k], np.average(points, axis=0, weights=q[:, k]), atol=1e-14)


def test_em_finds_two_distant_clusters() -> None:
    points = np.array([[0.0], [1.0], [100.0], [101.0], [102.0], [103.0]])
    weights, means = reference.em(points, [0, 5], 3)
    assert np.allclose(weights, [2 / 6, 4 / 6])
    assert np.allclose(means, [[0.5], [101.5]])


def test_em_never_decreases_the_log_likelihood(rng: np.random.Generator) -> None:
    points = rng.normal(size=(20, 2)) * 2
    values = [reference.em_log_likelihood(points, *reference.em(points, [0, 1, 2], i)) for i in range(8)]
    assert all(b >= a - 1e-10 for a, b in pairwise(values))


def test_class_posterior_equals_bayes_rule_with_scipy_densities(rng: np.random.Generator) -> None:
    means, variances, z = rng.normal(size=(3, 4)), rng.uniform(0.2, 2, size=(3, 4)), rng.normal(size=4)
    density = np.array([multivariate_normal(m, np.diag(v)).pdf(z) for m, v in zip(means, variances, strict=True)])
    assert np.allclose(reference.class_posterior(z, means, variances), density / density.sum(), atol=1e-12)


def test_semi_supervised_em_without_queries_is_each_class_mean_and_variance(rng: np.random.Generator) -> None:
    support = rng.normal(size=(3, 5, 2))
    for e_step in ("diagonal", "identity"):
        means, variances = reference.semi_supervised_em(support, np.zeros((0, 2)), 2, e_step)
        assert np.allclose(means, support.mean(1), atol=1e-14)
        assert np.allclose(variances, support.var(1), atol=1e-14)


def test_semi_supervised_em_with_distant_classes_includes_the_queries() -> None:
    support = np.array([[[0.0]], [[100.0]]])
    means, variances = reference.semi_supervised_em(support, np.array([[2.0], [104.0]]), 1)
    assert np.allclose(means, [[1.0], [102.0]])
    assert np.allclose(variances, [[1.0], [4.0]])


def test_semi_supervised_em_never_decreases_its_objective(rng: np.random.Generator) -> None:
    support, query = rng.normal(size=(3, 2, 2)) + np.arange(3)[:, None, None], rng.normal(size=(15, 2)) * 2
    values = []
    for iterations in range(1, 8):
        fitted = reference.semi_supervised_em(support, query, iterations)
        values.append(reference.semi_supervised_objective(support, query, *fitted))
    assert all(b >= a - 1e-10 for a, b in pairwise(values))


def test_final_posterior_averages_over_samples(rng: np.random.Generator) -> None:
    samples, means, variances = rng.normal(size=(2, 3, 2)), rng.normal(size=(4, 2)), np.full((4, 2), 0.5)
    logits = -((samples[:, :, None] - means) ** 2).sum(-1)
    assert np.allclose(
        reference.final_posterior(samples, means, variances), softmax(logits, axis=2).mean(1), atol=1e-12
    )


def test_bernoulli_log_likelihood_equals_scipy(rng: np.random.Generator) -> None:
    x, p = rng.integers(0, 2, size=(1, 3, 3)), rng.uniform(0.05, 0.95, size=(1, 3, 3))
    assert reference.bernoulli_log_likelihood(x.astype(float), p) == pytest.approx(
        bernoulli(p).logpmf(x).sum(), rel=1e-12
    )


def test_elbo_is_the_log_likelihood_if_posterior_equals_prior(rng: np.random.Generator) -> None:
    """If q equals a prior with one component, the two Gaussian terms cancel for any samples."""
    x, z = rng.integers(0, 2, size=(3, 2, 2)).astype(float), rng.normal(size=(3, 4, 2))
    p = expit(rng.normal(size=(3, 4, 2, 2)))
    mean, one = np.array([0.3, -0.2]), np.ones(2)
    value = reference.elbo(x, p, z, np.tile(mean, (3, 1)), np.tile(one, (3, 1)), np.ones(1), mean[None])
    expected = sum(bernoulli(p[j]).logpmf(np.tile(x[j], (4, 1, 1))).sum() / 4 for j in range(3))
    assert value == pytest.approx(expected, rel=1e-12)
    mean_scale = reference.elbo(x, p, z, np.tile(mean, (3, 1)), np.tile(one, (3, 1)), np.ones(1), mean[None], "mean")
    assert mean_scale == pytest.approx(expected / 3, rel=1e-12)


def test_batch_objective_is_the_mean_of_the_elbos() -> None:
    assert reference.batch_objective([1.0, 2.0, 6.0]) == 3.0


@pytest.mark.parametrize("scale", ["head", "model"])
def test_attention_equals_softmax_times_values(scale: str, rng: np.random.Generator) -> None:
    q, k, v = (rng.normal(size=(5, 4)) for _ in range(3))
    expected = softmax(q @ k.T / 2.0, axis=1) @ v  # one head: sqrt(4) either way
    assert np.allclose(reference.attention(q, k, v, 1, scale), expected, atol=1e-13)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        divisor = math.sqrt(2) if scale == "head" else 2.0
        halves.append(softmax(q[:, part] @ k[:, part].T / divisor, axis=1) @ v[:, part])
    assert np.allclose(reference.attention(q, k, v, 2, scale), np.concatenate(halves, 1), atol=1e-13)


def test_activations() -> None:
    x = np.array([-2.0, 0.0, 3.0])
    assert np.allclose(reference.activate(x, "elu"), [math.expm1(-2.0), 0.0, 3.0])
    assert np.allclose(reference.activate(x, "relu"), [0.0, 0.0, 3.0])


def test_nt_xent_of_equal_views_is_log_of_2n_minus_1() -> None:
    """All similarities are equal, so the positive has probability 1 / (2n - 1)."""
    same = np.tile(np.array([[1.0, 2.0]]), (4, 1))
    assert reference.nt_xent(same, same * 3, 0.2) == pytest.approx(math.log(7), rel=1e-12)


def test_nt_xent_of_orthogonal_pairs_equals_closed_form() -> None:
    e = np.eye(3)
    t = 0.5
    expected = -1 / t + math.log(math.exp(1 / t) + 4)
    assert reference.nt_xent(e, e, t) == pytest.approx(expected, rel=1e-12)
