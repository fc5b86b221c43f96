"""EM (Eq. 7) against its literal transcription, scikit-learn and closed forms; memory; difficult data."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metagmvae.training.objectives.distinct_points import MixtureError, first_distinct, init_indices, random_order
from metagmvae.training.objectives.mixture import (
    VARIANCE_FLOOR,
    ClassMixture,
    Mixture,
    class_log_posterior,
    fit_mixture,
    fit_semi_supervised,
)


def groups(rng: np.random.Generator, points: int, size: int, centres: int, spread: float = 3.0) -> np.ndarray:
    """Points around a few centres, (P, D) float64."""
    means = rng.normal(size=(centres, size)) * spread
    return means[rng.integers(0, centres, size=points)] + rng.normal(size=(points, size))


def keyed(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- Eq. 7 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("points", "size", "components"), [(7, 1, 1), (12, 3, 1), (40, 2, 3), (30, 8, 5), (60, 4, 50)])
def test_em_equals_the_transcription(points: int, size: int, components: int) -> None:
    rng = np.random.default_rng(points)
    z = np.stack([groups(rng, points, size, 3) for _ in range(2)])
    rows = np.stack([rng.permutation(points)[:components] for _ in range(2)])
    mixture = fit_mixture(torch.tensor(z), torch.tensor(rows), 4)
    log_prob = mixture.log_prob(torch.tensor(z))
    for e in range(2):
        weights, means = reference.em(z[e], list(rows[e]), 4)
        assert np.allclose(mixture.mean_EKD[e].numpy(), means, atol=1e-10)
        assert np.allclose(mixture.log_weight_EK[e].exp().numpy(), weights, atol=1e-12)
        expected = [reference.mixture_log_density(point, weights, means) for point in z[e]]
        assert np.allclose(log_prob[e].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_em_in_float32_is_accurate_far_from_zero(offset: float) -> None:
    """The transcription gets the same float32 points in float64, so only the arithmetic differs."""
    rng = np.random.default_rng(3)
    z = (groups(rng, 60, 16, 4, 1.0) + offset).astype(np.float32)
    mixture = fit_mixture(torch.tensor(z)[None], torch.arange(4)[None], 10)
    weights, means = reference.em(z.astype(np.float64), [0, 1, 2, 3], 10)
    resolution = 1e-5 if offset == 0.0 else 1.5e-4  # float32 steps are 6e-5 at 1e3
    assert np.allclose(mixture.mean_EKD[0].numpy(), means, rtol=0, atol=resolution)
    assert np.allclose(mixture.log_weight_EK[0].exp().numpy(), weights, rtol=0, atol=2e-5)
    log_prob = mixture.log_prob(torch.tensor(z)[None])[0].numpy()
    expected = [reference.mixture_log_density(point.astype(np.float64), weights, means) for point in z]
    assert np.allclose(log_prob, expected, rtol=0, atol=1e-4 if offset == 0.0 else 2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_em_equals_scikit_learn_with_identity_covariances(seed: int) -> None:
    """GaussianMixture re-estimates covariances, but only after an E-step with the given ones. One iteration from unit
    precisions gives the means and weights of Eq. 7, so single iterations are chained."""
    rng = np.random.default_rng(seed)
    size, components = 3, 4
    z = groups(rng, 80, size, components, 2.0)
    rows = rng.permutation(80)[:components]
    weights, means = np.full(components, 1 / components), z[rows]
    ones = np.ones(components)
    for iteration in range(1, 9):
        theirs = GaussianMixture(
            components,
            covariance_type="spherical",
            max_iter=1,
            reg_covar=0.0,
            weights_init=weights,
            means_init=means,
            precisions_init=ones,
            init_params="random_from_data",
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.fit(z)
        weights, means = theirs.weights_, theirs.means_
        ours = fit_mixture(torch.tensor(z)[None], torch.tensor(rows)[None], iteration)
        assert np.allclose(ours.mean_EKD[0].numpy(), means, atol=1e-10)
        assert np.allclose(ours.log_weight_EK[0].exp().numpy(), weights, atol=1e-12)
        theirs.precisions_cholesky_ = ones
        log_prob = ours.log_prob(torch.tensor(z)[None])[0].numpy()
        assert np.allclose(log_prob, theirs.score_samples(z), atol=1e-9)


def difficult_points(kind: str, rng: np.random.Generator) -> np.ndarray:
    base = groups(rng, 50, 4, 3)
    if kind == "duplicates":
        return np.concatenate([np.repeat(base[:5], 9, axis=0), base[5:10]])
    if kind == "far":
        return base + 1e3
    if kind == "outlier":
        base[0] += 200
        return base
    if kind == "line":
        return np.outer(np.linspace(-50, 50, 50), np.ones(4))
    if kind == "tiny":
        return base * 1e-6
    return base


@pytest.mark.parametrize("kind", ["plain", "duplicates", "far", "outlier", "line", "tiny"])
@pytest.mark.parametrize("components", [1, 2, 7, 20])
def test_log_likelihood_never_decreases(kind: str, components: int) -> None:
    for seed in range(6):
        rng = np.random.default_rng([seed, components])
        z = torch.tensor(difficult_points(kind, rng))[None]
        rows = torch.tensor(rng.permutation(z.shape[1])[:components])[None]
        values = [float(fit_mixture(z, rows, i).log_prob(z).sum()) for i in range(12)]
        # Each empty component keeps the weight of 1e-6 points, which costs at most as many nats.
        tolerance = 1e-6 * components + 1e-11 * abs(values[0])
        assert all(after >= before - tolerance for before, after in pairwise(values)), values


def test_log_likelihood_in_float32_decreases_by_rounding_at_most() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        z = torch.tensor(groups(rng, 200, 16, 6, 1.0), dtype=torch.float32)[None]
        rows = torch.tensor(rng.permutation(200)[:6])[None]
        values = [float(fit_mixture(z, rows, i).log_prob(z).double().sum()) for i in range(12)]
        assert all(b >= a - 2e-6 * abs(a) for a, b in pairwise(values)), values


def test_zero_iterations_return_the_initial_mixture() -> None:
    z = torch.tensor(groups(np.random.default_rng(0), 10, 2, 2))[None]
    mixture = fit_mixture(z, torch.tensor([[3, 8]]), 0)
    assert torch.allclose(mixture.mean_EKD[0], z[0, [3, 8]], atol=1e-12)
    assert torch.allclose(mixture.log_weight_EK.exp(), torch.full((1, 2), 0.5, dtype=torch.float64))


STARVING = [-6.6, -5.7, -3.3, 2.9, 11.2, 11.21, 11.34, 11.53, 40.0, 42.0, 48.1, 66.6]
"""With means started at 11.2, -6.6, 11.21 and 2.9, the first component loses all points in the second iteration."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_component_keeps_its_mean_and_a_vanishing_weight(dtype: torch.dtype) -> None:
    z = torch.tensor(STARVING, dtype=dtype)[None, :, None]
    rows = torch.tensor([[4, 0, 5, 3]])
    populated, empty, later = (fit_mixture(z, rows, i) for i in (1, 2, 10))
    assert float(populated.log_weight_EK[0, 0].exp()) > 0.1
    assert float(empty.log_weight_EK[0, 0].exp()) < 1e-6
    assert torch.equal(later.mean_EKD[0, 0], empty.mean_EKD[0, 0])
    assert torch.isfinite(later.mean_EKD).all()
    assert torch.allclose(later.log_weight_EK.exp().sum(dim=1), torch.ones(1, dtype=dtype))
    without = Mixture(later.mean_EKD[:, 1:], later.log_weight_EK[:, 1:])
    assert torch.allclose(later.log_prob(z), without.log_prob(z), atol=1e-5)


def test_equal_points_fit_one_component() -> None:
    z = torch.full((1, 9, 3), 2.5)
    mixture = fit_mixture(z, torch.tensor([[4]]), 10)
    assert torch.equal(mixture.mean_EKD, torch.full((1, 1, 3), 2.5))
    assert torch.equal(mixture.log_weight_EK, torch.zeros(1, 1))
    expected = reference.mixture_log_density(np.full(3, 2.5), np.ones(1), np.full((1, 3), 2.5))
    assert torch.allclose(mixture.log_prob(z), torch.full((1, 9), expected))


def test_episodes_are_independent() -> None:
    rng = np.random.default_rng(1)
    z = torch.tensor(np.stack([groups(rng, 30, 4, 3) + 50 * e for e in range(3)]))
    rows = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8], [9, 3, 1, 0]])
    together = fit_mixture(z, rows, 5)
    for e in range(3):
        separate = fit_mixture(z[e : e + 1], rows[e : e + 1], 5)
        assert torch.allclose(together.mean_EKD[e], separate.mean_EKD[0], atol=1e-12)
        assert torch.allclose(together.log_weight_EK[e], separate.log_weight_EK[0], atol=1e-12)


def test_psi_has_no_gradient_and_the_density_has_one() -> None:
    z = torch.tensor(groups(np.random.default_rng(2), 12, 3, 2))[None].requires_grad_()
    mixture = fit_mixture(z, torch.tensor([[0, 5]]), 3)
    assert not mixture.mean_EKD.requires_grad
    assert not mixture.log_weight_EK.requires_grad
    assert torch.autograd.gradcheck(lambda points: mixture.log_prob(points), (z,))


# --- initial means ----------------------------------------------------------------------------------------


def test_initial_indices_are_distinct_and_depend_on_the_generator() -> None:
    z = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0))
    rows = init_indices(z, 7, keyed(1, 2, 3))
    assert torch.equal(rows, init_indices(z, 7, keyed(1, 2, 3)))
    assert torch.equal(rows[1:2], init_indices(z[1:2], 7, keyed(2)))
    assert all(len(set(row.tolist())) == 7 for row in rows)
    assert len({tuple(init_indices(z[:1], 7, keyed(seed))[0].tolist()) for seed in range(20)}) == 20


def test_every_point_is_equally_likely_as_an_initial_mean() -> None:
    z = torch.arange(10.0)[None, :, None]
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(3000):
        counts[init_indices(z, 3, [generator])[0]] += 1
    # Binomial(3000, 0.3): standard deviation 25.1; five of them.
    assert (counts - 900).abs().max() < 126


@pytest.mark.parametrize("seed", range(20))
def test_equal_points_never_start_two_components(seed: int) -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    z = values[torch.tensor([0] * 30 + [1, 2, 3])][None]
    rows = init_indices(z, 4, keyed(seed))
    assert len(torch.unique(z[0, rows[0]], dim=0)) == 4


def test_first_distinct_points_of_an_order_equal_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 3, (20, 9, 2), generator=generator).float()  # many equal points
    order = random_order(9, [generator] * 20)
    index, enough = first_distinct(z, order, 5)
    for points, row, picked, found in zip(z, order.tolist(), index.tolist(), enough.tolist(), strict=True):
        expected: list[int] = []
        for i in row:
            if all(not torch.equal(points[i], points[j]) for j in expected):
                expected.append(i)
        assert found == (len(expected) >= 5)
        assert picked[: len(expected)] == expected[:5]
    assert 0 < int(enough.sum()) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_that_differ_in_one_bit_are_distinct(dtype: torch.dtype) -> None:
    point = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    points = [point, point.clone()]
    for i in range(8):
        other = point.clone()
        other[i] = torch.nextafter(other[i], torch.tensor(9.0, dtype=dtype))
        points.append(other)
    points += [point.flip(0), -point, point.roll(1), torch.zeros(8, dtype=dtype), -torch.zeros(8, dtype=dtype)]
    z = torch.stack(points)[None]
    assert not first_distinct(z, torch.arange(len(points))[None], 14)[1]  # the second and the last repeat a value
    index, enough = first_distinct(z, torch.arange(len(points))[None], 13)
    assert enough
    assert index[0].tolist() == [0, *range(2, 14)]


def test_more_components_than_distinct_points_is_an_error() -> None:
    z = torch.tensor([0.0, 1.0, 1.0, 0.0, 2.0])[None, :, None]
    assert sorted(z[0, init_indices(z, 3, keyed(0))[0], 0].tolist()) == [0.0, 1.0, 2.0]
    with pytest.raises(MixtureError, match=r"4 components need .* fewer: lower train\.components") as caught:
        init_indices(z, 4, keyed(0))
    assert "\n" not in str(caught.value)
    with pytest.raises(MixtureError, match="6 components"):
        init_indices(z, 6, keyed(0))


# --- memory -----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


def test_largest_tensor_is_recorded() -> None:
    z, means = torch.randn(2, 50, 8), torch.randn(2, 5, 8)
    with Largest() as largest:
        (z[:, :, None] - means[:, None]).square().sum(-1)
    assert largest.numel == 2 * 50 * 5 * 8


def test_no_tensor_has_points_times_components_times_dimensions() -> None:
    E, P, K, D = 2, 300, 20, 24
    z = torch.randn(E, P, D, requires_grad=True)
    with Largest() as largest:
        mixture = fit_mixture(z.detach(), init_indices(z.detach(), K, keyed(0, 1)), 3)
        mixture.log_prob(z).sum().backward()
    assert largest.numel == E * P * max(D, K)
    with Largest() as largest:
        fitted = fit_semi_supervised(torch.randn(E, K, 5, D), z.detach(), iterations=3)
        class_log_posterior(fitted, z.detach())
    assert largest.numel == E * P * max(D, K)
    assert isinstance(fitted, ClassMixture)
    assert float(fitted.variance_EKD.min()) >= VARIANCE_FLOOR
