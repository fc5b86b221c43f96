"""Semi-supervised EM with estimated class weights and with a background component, against plain loops."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from metagmvae.training.objectives.mixture import (
    ClassMixture,
    class_log_posterior,
    class_logits,
    fit_semi_supervised,
    with_background,
)


def log_density(z: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """log N(z; mean, diag(variance)) without -D/2 log(2 pi)."""
    return float(sum(-0.5 * (z - mean) ** 2 / variance - 0.5 * np.log(variance)))


def slow_fit(support, query, iterations, temperature, prior_count, background, diagonal):
    """One episode by loops: means (K, D), variances (K, D), weights (K,)."""
    K, T, D = support.shape
    mean, variance, weight = support.mean(axis=1), np.ones((K, D)), np.full(K, 1 / K)
    for _ in range(iterations):
        responsibility = np.zeros((len(query), K))
        for i, z in enumerate(query):
            used = variance if diagonal else np.ones_like(variance)
            joint = [math.log(K * weight[k]) + log_density(z, mean[k], used[k]) / temperature for k in range(K)]
            everything = [*joint, background] if background is not None else joint
            total = sum(math.exp(value - max(everything)) for value in everything)
            responsibility[i] = [math.exp(value - max(everything)) / total for value in joint]
        if prior_count is not None:
            count = responsibility.sum(axis=0)
            weight = (count + prior_count) / (count + prior_count).sum()
        for k in range(K):
            points, r = np.concatenate([support[k], query]), np.concatenate([np.ones(T), responsibility[:, k]])
            mean[k] = (r[:, None] * points).sum(axis=0) / r.sum()
            variance[k] = (r[:, None] * (points - mean[k]) ** 2).sum(axis=0) / r.sum()
    return mean, variance, weight


@pytest.mark.parametrize("prior_count", [None, 0.0, 1.5])
@pytest.mark.parametrize("background", [None, -2.0])
@pytest.mark.parametrize(("e_step", "temperature"), [("diagonal", 1.0), ("identity", 3.0)])
def test_fit_equals_plain_loops(prior_count, background, e_step, temperature):
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(3, 2))
    support = centres[:, None] + 0.5 * rng.normal(size=(3, 2, 2))
    query = np.concatenate([centres[k] + rng.normal(size=(n, 2)) for k, n in enumerate((12, 3, 1))])
    mixture = fit_semi_supervised(
        torch.tensor(support)[None],
        torch.tensor(query)[None],
        iterations=4,
        e_step=e_step,
        temperature=temperature,
        prior_count=prior_count,
        background=background,
    )
    mean, variance, weight = slow_fit(support, query, 4, temperature, prior_count, background, e_step == "diagonal")
    np.testing.assert_allclose(mixture.mean_EKD[0].numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(mixture.variance_EKD[0].numpy(), variance, rtol=1e-9)
    if prior_count is None:
        assert mixture.log_weight_EK is None
    else:
        np.testing.assert_allclose(mixture.log_weight_EK[0].exp().numpy(), weight, rtol=1e-9)


def test_weights_are_those_of_scikit_learn_without_prior():
    """With thousands of unlabelled points the one labelled point of each class hardly counts."""
    rng = np.random.default_rng(1)
    counts, centres = (9_000, 4_000, 2_000), np.array([[0.0, 0.0], [3.0, 1.0], [-2.0, 4.0]])
    query = np.concatenate([c + rng.normal(size=(n, 2)) for c, n in zip(centres, counts, strict=True)])
    expected = GaussianMixture(
        3, covariance_type="diag", weights_init=[1 / 3] * 3, means_init=centres, precisions_init=np.ones((3, 2)),
        max_iter=8, tol=0.0, reg_covar=0.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight iterations are no convergence
        expected.fit(query)
    support, points = torch.tensor(centres)[None, :, None], torch.tensor(query)[None]
    mixture = fit_semi_supervised(support, points, iterations=8, prior_count=0.0)
    np.testing.assert_allclose(mixture.log_weight_EK[0].exp().numpy(), expected.weights_, rtol=0.02)
    np.testing.assert_allclose(mixture.mean_EKD[0].numpy(), expected.means_, atol=0.05)
    posterior = class_log_posterior(mixture, points)[0].exp().numpy()
    np.testing.assert_allclose(posterior, expected.predict_proba(query), atol=0.02)


def test_weights_are_the_mode_of_the_dirichlet_posterior():
    """Well separated classes have whole numbers of points: (n_k + a) / (n + K a)."""
    centres = torch.tensor([[0.0], [100.0], [200.0]], dtype=torch.float64)
    query = centres.repeat_interleave(torch.tensor([6, 3, 0]), dim=0)[None]
    for a in (0.5, 2.0, 1e5):
        weights = fit_semi_supervised(centres[None, :, None], query, iterations=2, prior_count=a).log_weight_EK.exp()
        torch.testing.assert_close(weights, (torch.tensor([[6.0, 3.0, 0.0]]) + a).double() / (9 + 3 * a))
    no_prior = fit_semi_supervised(centres[None, :, None], query, iterations=2, prior_count=0.0)
    assert torch.isfinite(no_prior.log_weight_EK).all()  # also of the class without a point
    assert no_prior.log_weight_EK[0, 2] < -10


def test_estimated_weights_move_the_posterior_by_the_prior_odds():
    mixture = ClassMixture(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[0.9, 0.1]]).log())
    posterior = class_log_posterior(mixture, torch.zeros(1, 1, 1), temperature=16.0).exp()
    torch.testing.assert_close(posterior, torch.tensor([[[0.9, 0.1]]]))


def test_without_queries_the_weights_are_equal():
    mixture = fit_semi_supervised(torch.randn(1, 3, 2, 4), torch.zeros(1, 0, 4), iterations=2, prior_count=1.0)
    assert mixture.log_weight_EK is None


def test_the_background_keeps_far_points_out_of_the_classes():
    torch.manual_seed(0)
    support = torch.tensor([[[0.0, 0.0]], [[6.0, 0.0]]])[None]
    near = support[0, :, 0].repeat_interleave(10, dim=0) + 0.3 * torch.randn(20, 2)
    far = torch.tensor([2.0, 15.0]) + 0.3 * torch.randn(20, 2)
    query = torch.cat([near, far])[None]
    plain = fit_semi_supervised(support, query, iterations=10, e_step="identity")
    robust = fit_semi_supervised(support, query, iterations=10, e_step="identity", background=-10.0)
    assert (plain.mean_EKD[0, :, 1] > 3).any()
    torch.testing.assert_close(robust.mean_EKD[0], support[0, :, 0], atol=0.3, rtol=0)
    answer = with_background(class_logits(robust, query, "identity"), -10.0)[0].argmax(dim=1)
    assert answer.tolist() == [0] * 10 + [1] * 10 + [2] * 20


def test_a_low_background_changes_nothing():
    torch.manual_seed(0)
    support, query = torch.randn(2, 3, 2, 4), torch.randn(2, 9, 4)
    plain = fit_semi_supervised(support, query, iterations=5)
    for one, other in zip(
        plain[:2], fit_semi_supervised(support, query, iterations=5, background=-1e4)[:2], strict=True
    ):
        torch.testing.assert_close(one, other)
