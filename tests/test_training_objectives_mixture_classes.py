"""Semi-supervised EM (Eq. 10) and the posterior of Eq. 11 against transcription and closed forms; difficult data."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import reference
import torch
from sklearn.naive_bayes import GaussianNB

from metagmvae.training.objectives.mixture import VARIANCE_FLOOR, ClassMixture, class_log_posterior, fit_semi_supervised

Covariance = Literal["diagonal", "identity"]
BOTH: list[Covariance] = ["diagonal", "identity"]


def episode(
    seed: int, way: int, shot: int, queries: int, size: int, spread: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Labelled points (K, T, D) and unlabelled points (P, D) of the same K clusters."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(way, size)) * spread
    scale = rng.uniform(0.3, 1.5, size=(way, size))
    support = means[:, None] + scale[:, None] * rng.normal(size=(way, shot, size))
    label = rng.integers(0, way, size=queries)
    return support, means[label] + scale[label] * rng.normal(size=(queries, size))


def fitted(support: np.ndarray, query: np.ndarray, iterations: int, e_step: Covariance) -> ClassMixture:
    return fit_semi_supervised(
        torch.tensor(support)[None], torch.tensor(query)[None], iterations=iterations, e_step=e_step
    )


@pytest.mark.parametrize("e_step", BOTH)
@pytest.mark.parametrize(
    ("way", "shot", "queries", "size"), [(1, 1, 3, 2), (3, 2, 12, 4), (5, 1, 20, 3), (50, 2, 10, 2)]
)
def test_semi_supervised_em_equals_the_transcription(
    way: int, shot: int, queries: int, size: int, e_step: Covariance
) -> None:
    """For any number of ways: the fit does not depend on the K of training."""
    support, query = episode(way, way, shot, queries, size)
    for iterations in (1, 4):
        mixture = fitted(support, query, iterations, e_step)
        means, variances = reference.semi_supervised_em(support, query, iterations, e_step, VARIANCE_FLOOR)
        assert np.allclose(mixture.mean_EKD[0].numpy(), means, rtol=0, atol=1e-8)
        assert np.allclose(mixture.variance_EKD[0].numpy(), variances, rtol=0, atol=1e-8)


@pytest.mark.parametrize("e_step", BOTH)
def test_padding_of_unequal_shots_has_no_influence(e_step: Covariance) -> None:
    """Classes with 1 to 3 labelled points; the padding has arbitrary values."""
    padded, query = episode(9, 3, 3, 12, 4)
    shots, mask = (1, 3, 2), np.zeros((3, 3))
    for k, count in enumerate(shots):
        mask[k, :count] = 1
        padded[k, count:] = 50.0
    mixture = fit_semi_supervised(
        torch.tensor(padded)[None],
        torch.tensor(query)[None],
        iterations=4,
        e_step=e_step,
        mask_EKT=torch.tensor(mask)[None],
    )
    support = [padded[k, :count] for k, count in enumerate(shots)]
    means, variances = reference.semi_supervised_em(support, query, 4, e_step, VARIANCE_FLOOR)
    assert np.allclose(mixture.mean_EKD[0].numpy(), means, rtol=0, atol=1e-8)
    assert np.allclose(mixture.variance_EKD[0].numpy(), variances, rtol=0, atol=1e-8)


@pytest.mark.parametrize("e_step", BOTH)
@pytest.mark.parametrize("temperature", [0.5, 6.0])
def test_em_with_a_temperature_equals_the_transcription(temperature: float, e_step: Covariance) -> None:
    support, query = episode(8, 4, 2, 20, 3)
    labelled, unlabelled = torch.tensor(support)[None], torch.tensor(query)[None]
    mixture = fit_semi_supervised(labelled, unlabelled, iterations=4, e_step=e_step, temperature=temperature)
    means, variances = reference.semi_supervised_em(support, query, 4, e_step, VARIANCE_FLOOR, temperature)
    assert np.allclose(mixture.mean_EKD[0].numpy(), means, rtol=0, atol=1e-8)
    assert np.allclose(mixture.variance_EKD[0].numpy(), variances, rtol=0, atol=1e-8)
    posterior = class_log_posterior(mixture, unlabelled, "diagonal", temperature).exp()[0].numpy()
    expected = [reference.class_posterior(z, means, variances, temperature) for z in query]
    assert np.allclose(posterior, expected, rtol=0, atol=1e-9)


def test_temperature_equals_a_larger_identity_covariance() -> None:
    """N(z; mu, I)^(1/T) is proportional to N(z; mu, T I): the same as dividing all points by sqrt(T)."""
    support, query = episode(9, 4, 3, 24, 5)
    labelled, unlabelled = torch.tensor(support)[None], torch.tensor(query)[None]
    tempered = fit_semi_supervised(labelled, unlabelled, iterations=5, e_step="identity", temperature=9.0)
    scaled = fit_semi_supervised(labelled / 3, unlabelled / 3, iterations=5, e_step="identity")
    assert torch.allclose(tempered.mean_EKD, scaled.mean_EKD * 3, atol=1e-10)
    plain = fit_semi_supervised(labelled, unlabelled, iterations=5, e_step="identity")
    assert not torch.allclose(tempered.mean_EKD, plain.mean_EKD, atol=1e-3)


@pytest.mark.parametrize("e_step", BOTH)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_float32_is_accurate_far_from_zero(e_step: Covariance, offset: float) -> None:
    support, query = (part.astype(np.float32) + np.float32(offset) for part in episode(5, 4, 6, 24, 8))
    mixture = fitted(support, query, 5, e_step)
    exact_support, exact_query = support.astype(np.float64), query.astype(np.float64)
    means, variances = reference.semi_supervised_em(exact_support, exact_query, 5, e_step)
    assert mixture.mean_EKD.dtype == torch.float32
    assert np.allclose(mixture.mean_EKD[0].numpy(), means, rtol=0, atol=1e-5 if offset == 0.0 else 2e-4)
    assert np.allclose(mixture.variance_EKD[0].numpy(), variances, rtol=2e-4, atol=2e-5)
    posterior = class_log_posterior(mixture, torch.tensor(query)[None]).exp()[0].numpy()
    expected = [reference.class_posterior(z, means, variances) for z in exact_query]
    assert np.allclose(posterior, expected, rtol=0, atol=1e-4 if offset == 0.0 else 5e-3)


@pytest.mark.parametrize("e_step", BOTH)
def test_without_unlabelled_points_the_fit_is_each_class_mean_and_variance(e_step: Covariance) -> None:
    support, _ = episode(1, 6, 7, 0, 5)
    for iterations in (1, 3):
        mixture = fitted(support, np.zeros((0, 5)), iterations, e_step)
        assert np.allclose(mixture.mean_EKD[0].numpy(), support.mean(1), rtol=0, atol=1e-13)
        assert np.allclose(mixture.variance_EKD[0].numpy(), support.var(1), rtol=0, atol=1e-12)


def test_without_unlabelled_points_the_posterior_equals_gaussian_naive_bayes() -> None:
    support, query = episode(2, 4, 9, 30, 3)
    theirs = GaussianNB(priors=[0.25] * 4, var_smoothing=0.0)
    theirs.fit(support.reshape(36, 3), np.repeat(np.arange(4), 9))
    mixture = class_log_posterior(fitted(support, np.zeros((0, 3)), 1, "diagonal"), torch.tensor(query)[None])
    assert np.allclose(mixture[0].numpy(), theirs.predict_log_proba(query), rtol=0, atol=1e-9)


def test_posterior_with_identity_covariance_is_a_softmax_of_squared_distances() -> None:
    support, query = episode(3, 5, 3, 40, 4)
    mixture = fitted(support, query, 2, "identity")
    distances = torch.cdist(torch.tensor(query), mixture.mean_EKD[0]).square()
    posterior = class_log_posterior(mixture, torch.tensor(query)[None], "identity")
    assert torch.allclose(posterior[0], torch.log_softmax(-0.5 * distances, dim=1), atol=1e-10)


@pytest.mark.parametrize("covariance", BOTH)
def test_final_posterior_equals_eq_11(covariance: Covariance) -> None:
    rng = np.random.default_rng(4)
    support, query = episode(4, 3, 4, 5, 3)
    samples = query[:, None] + 0.5 * rng.normal(size=(5, 6, 3))
    mixture = fitted(support, samples.reshape(30, 3), 3, "diagonal")
    means, variances = reference.semi_supervised_em(support, samples.reshape(30, 3), 3)
    used = variances if covariance == "diagonal" else np.ones_like(variances)
    log_posterior = class_log_posterior(mixture, torch.tensor(samples.reshape(1, 30, 3)), covariance)
    probabilities = log_posterior.exp().unflatten(1, (5, 6)).mean(dim=2)[0].numpy()
    assert np.allclose(probabilities, reference.final_posterior(samples, means, used), rtol=0, atol=1e-9)
    assert np.allclose(probabilities.sum(1), 1.0)


@pytest.mark.parametrize("kind", ["plain", "one-shot", "duplicates", "far", "crowded", "tiny"])
def test_objective_of_eq_10_never_decreases(kind: str) -> None:
    for seed in range(5):
        support, query = episode(seed, 4, 1 if kind == "one-shot" else 3, 20, 3)
        if kind == "duplicates":
            support, query = np.repeat(support[:, :1], 3, axis=1), np.repeat(query[:4], 5, axis=0)
        if kind == "far":
            support, query = support + 1e3, query + 1e3
        if kind == "crowded":
            support, query = support * 0.05, query * 0.05
        if kind == "tiny":
            support, query = support * 1e-4, query * 1e-4
        values = []
        for iterations in range(1, 9):
            mixture = fitted(support, query, iterations, "diagonal")
            means, variances = mixture.mean_EKD[0].numpy(), mixture.variance_EKD[0].numpy()
            values.append(reference.semi_supervised_objective(support, query, means, variances))
        assert all(after >= before - 1e-6 - 1e-9 * abs(before) for before, after in pairwise(values)), values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("e_step", BOTH)
def test_equal_points_give_the_smallest_variance_and_a_finite_posterior(dtype: torch.dtype, e_step: Covariance) -> None:
    support = torch.tensor([[[0.0, 1.0]] * 4, [[3.0, 1.0]] * 4], dtype=dtype)[None]
    query = torch.tensor([[[0.0, 1.0], [3.0, 1.0], [3.0, 1.0]]], dtype=dtype)
    mixture = fit_semi_supervised(support, query, iterations=10, e_step=e_step)
    assert float(mixture.variance_EKD.min()) >= VARIANCE_FLOOR * (1 - 1e-6)
    posterior = class_log_posterior(mixture, query).exp()
    assert torch.isfinite(posterior).all()
    assert posterior.argmax(dim=2).tolist() == [[0, 1, 1]]
    assert torch.allclose(posterior.sum(dim=2), torch.ones(1, 3, dtype=dtype))


def test_equal_classes_have_equal_posteriors() -> None:
    support, query = torch.ones(1, 3, 2, 4), torch.ones(1, 5, 4)
    mixture = fit_semi_supervised(support, query, iterations=10)
    posterior = class_log_posterior(mixture, query).exp()
    assert torch.allclose(posterior, torch.full((1, 5, 3), 1 / 3))


def test_query_far_from_every_class_has_a_finite_posterior() -> None:
    support, query = torch.randn(1, 3, 2, 4), torch.full((1, 1, 4), 1e4)
    mixture = fit_semi_supervised(support, query, iterations=10)
    posterior = class_log_posterior(mixture, query).exp()
    assert torch.isfinite(posterior).all()
    assert torch.allclose(posterior.sum(dim=2), torch.ones(1, 1))


@pytest.mark.parametrize("e_step", BOTH)
def test_episodes_are_independent_and_queries_and_classes_equivariant(e_step: Covariance) -> None:
    parts = [episode(seed, 4, 2, 15, 3) for seed in range(3)]
    support = torch.tensor(np.stack([s for s, _ in parts]))
    query = torch.tensor(np.stack([q for _, q in parts]))
    together = fit_semi_supervised(support, query, iterations=4, e_step=e_step)
    for e in range(3):
        separate = fit_semi_supervised(support[e : e + 1], query[e : e + 1], iterations=4, e_step=e_step)
        assert torch.allclose(together.mean_EKD[e], separate.mean_EKD[0], atol=1e-10)
    classes, order = torch.tensor([2, 0, 3, 1]), torch.randperm(15)
    permuted = fit_semi_supervised(support[:, classes], query[:, order], iterations=4, e_step=e_step)
    assert torch.allclose(permuted.mean_EKD, together.mean_EKD[:, classes], atol=1e-10)
    assert torch.allclose(permuted.variance_EKD, together.variance_EKD[:, classes], atol=1e-10)


def test_zero_iterations_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"iterations \(0\) must be at least 1"):
        fit_semi_supervised(torch.zeros(1, 2, 1, 3), torch.zeros(1, 4, 3), iterations=0)
