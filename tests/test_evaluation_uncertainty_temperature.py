"""Temperature of the posterior: fitted to the smallest negative log-likelihood, and never changing a prediction."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.metrics import BINS, Reliability
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.evaluation.uncertainty.temperature import RANGE, fit_temperature, negative_log_likelihood
from metagmvae.training.objectives.class_posterior import fit_log_posteriors


def drawn(n: int, K: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, and labels drawn from them at a temperature: the right answer of the fit."""
    rng = np.random.default_rng(seed)
    log_p = log_softmax(4 * max(1.0, temperature / 8) * rng.normal(size=(n, K)), axis=1)
    p = softmax(log_p / temperature, axis=1)
    return log_p, (rng.random((n, 1)) < p.cumsum(axis=1)).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 8.0, 60.0])
def test_the_temperature_that_the_labels_were_drawn_at_is_found(temperature):
    log_p, labels = drawn(20_000, 5, temperature)
    assert fit_temperature(log_p, labels) == pytest.approx(temperature, rel=0.05)


def test_no_temperature_of_a_grid_is_better():
    log_p, labels = drawn(500, 3, 3.0, seed=1)
    fitted = fit_temperature(log_p, labels)
    grid = np.geomspace(*RANGE, 2000)
    losses = [negative_log_likelihood(log_p, labels, t) for t in grid]
    assert negative_log_likelihood(log_p, labels, fitted) <= min(losses) + 1e-12
    assert fitted == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


def test_the_likelihood_is_that_of_scikit_learn():
    log_p, labels = drawn(200, 4, 1.0)
    for temperature in (0.5, 1.0, 3.0):
        expected = log_loss(labels, softmax(log_p / temperature, axis=1), labels=range(4))
        assert negative_log_likelihood(log_p, labels, temperature) == pytest.approx(expected)


def test_only_correct_predictions_give_the_end_of_the_range():
    log_p, _ = drawn(50, 3, 1.0)
    assert fit_temperature(log_p, log_p.argmax(axis=1)) == pytest.approx(RANGE[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0, 20.0])
def test_no_prediction_changes(dtype, temperature):
    """Also where two classes have almost or exactly the same probability, and where one underflows."""
    torch.manual_seed(0)
    support, query = torch.randn(40, 4, 2, 3, dtype=dtype), 5 * torch.randn(40, 30, 2, 3, dtype=dtype)
    support[:, 1] = support[:, 0]  # a class twice: exactly equal
    support[:, 3] = support[:, 2] * (1 + torch.finfo(dtype).eps)
    adapt = AdaptSettings(e_step="identity", final_covariance="identity", iterations=3, samples=2)
    _, log_p = fit_log_posteriors(adapt, support, query)
    probabilities = calibrated(log_p, 1.0).to(dtype)
    assert torch.equal(calibrated(log_p, temperature).argmax(dim=2), probabilities.argmax(dim=2))
    torch.testing.assert_close(calibrated(log_p, temperature).sum(dim=2), torch.ones(40, 30, dtype=torch.float64))


def test_probabilities_that_underflow_keep_their_differences():
    """p^(1/T) of e^-200 and e^-400 at T = 100: float32 probabilities would both be 0."""
    support, query = torch.tensor([[[[0.0]], [[20.0]], [[28.2842712]]]]), torch.tensor([[[[0.0]]]])
    adapt = AdaptSettings(e_step="identity", final_covariance="identity", samples=1)
    _, log_p = fit_log_posteriors(adapt, support, query, fit_on_queries=False)
    expected = softmax(np.array([0.0, -200.0, -400.0]) / 100)
    np.testing.assert_allclose(calibrated(log_p, 100.0)[0, 0].numpy(), expected, rtol=1e-4)


def test_calibration_error_against_a_literal_transcription_and_scikit_learn():
    """ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)| over 15 bins of equal width (Guo et al., 2017, Eq. 3)."""
    log_p, labels = drawn(3_000, 2, 2.0)
    p = np.exp(log_p)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == labels
    expected = 0.0
    for m in range(BINS):
        inside = (confidence >= m / BINS) & ((confidence < (m + 1) / BINS) | (m == BINS - 1))
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    reliability = Reliability()
    reliability.add(p, labels)
    assert BINS == 15
    assert reliability.calibration_error == pytest.approx(expected, abs=1e-12)
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=BINS)
    bins = reliability.summary()["bins"]
    np.testing.assert_allclose([row["accuracy"] for row in bins], accuracy)
    np.testing.assert_allclose([row["confidence"] for row in bins], mean_confidence)
