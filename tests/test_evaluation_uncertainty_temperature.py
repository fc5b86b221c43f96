"""The map of the probabilities: fitted to the smallest negative log-likelihood, and never changing a prediction."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.metrics import BINS, Reliability
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.evaluation.uncertainty.temperature import MAX_UNIFORM, RANGE, fit_map, negative_log_likelihood
from metagmvae.training.models.posterior_calibration import UNCALIBRATED, CalibrationMap
from metagmvae.training.objectives.class_posterior import fit_log_posteriors


def drawn(n: int, K: int, temperature: float, seed: int = 0, uniform: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, and labels drawn from their map: the right answer of the fit."""
    rng = np.random.default_rng(seed)
    log_p = log_softmax(4 * max(1.0, temperature / 8) * rng.normal(size=(n, K)), axis=1)
    p = (1 - uniform) * softmax(log_p / temperature, axis=1) + uniform / K
    return log_p, (rng.random((n, 1)) < p.cumsum(axis=1)).argmax(axis=1)


def literal_loss(log_p: np.ndarray, labels: np.ndarray, temperature: float, uniform: float) -> float:
    """-1/n sum_i log((1 - u) p_i(y)^(1/T) / sum_j p_i(j)^(1/T) + u/K), term by term."""
    total = 0.0
    for row, label in zip(log_p, labels, strict=True):
        powers = [np.exp(value) ** (1 / temperature) for value in row]
        total -= np.log((1 - uniform) * powers[label] / sum(powers) + uniform / len(row))
    return total / len(labels)


@pytest.mark.parametrize("uniform", [0.0, 0.15])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 8.0, 60.0])
def test_the_map_that_the_labels_were_drawn_from_is_found(temperature, uniform):
    """From T = 8 the probabilities are flat, and 20,000 labels determine T and u less well than the map itself."""
    log_p, labels = drawn(20_000, 5, temperature, uniform=uniform)
    fitted = fit_map(log_p, labels)
    flat = 4 if temperature >= 8 else 1
    assert fitted.temperature == pytest.approx(temperature, rel=0.06 * flat)
    assert fitted.uniform == pytest.approx(uniform, abs=0.02 * flat)
    truth = CalibrationMap(temperature=temperature, uniform=uniform)
    difference = calibrated(torch.as_tensor(log_p), fitted) - calibrated(torch.as_tensor(log_p), truth)
    assert difference.abs().mean() < 0.006


@pytest.mark.parametrize("uniform", [0.0, 0.3])
def test_no_map_of_a_grid_is_better_and_the_gradient_is_zero(uniform):
    log_p, labels = drawn(500, 3, 3.0, seed=1, uniform=uniform)
    fitted = fit_map(log_p, labels)
    loss = negative_log_likelihood(log_p, labels, fitted)
    for u in np.linspace(0, MAX_UNIFORM, 19):
        for t in np.geomspace(*RANGE, 100):
            assert loss <= negative_log_likelihood(log_p, labels, CalibrationMap(temperature=t, uniform=u)) + 1e-9

    def finite_difference(temperature: float, uniform: float) -> float:
        more, less = (
            literal_loss(log_p, labels, fitted.temperature + sign * temperature, fitted.uniform + sign * uniform)
            for sign in (1, -1)
        )
        return (more - less) / (2 * (temperature + uniform))

    assert finite_difference(1e-4, 0.0) == pytest.approx(0, abs=1e-5)
    if uniform:
        assert fitted.uniform == pytest.approx(uniform, abs=0.1)
        assert finite_difference(0.0, 1e-4) == pytest.approx(0, abs=1e-5)


def test_where_no_confident_prediction_is_wrong_it_is_the_temperature_alone():
    """Improbable labels are left out, so that the mean of 1/p of the labels is less than K: u is exactly 0."""
    log_p, labels = drawn(3_000, 4, 1.0, seed=2)
    kept = log_p[np.arange(3_000), labels] > np.log(0.1)
    log_p, labels = log_p[kept], labels[kept]
    fitted = fit_map(log_p, labels)
    assert fitted.uniform == 0
    losses = [literal_loss(log_p, labels, t, 0.0) for t in (fitted.temperature * np.array([0.98, 1.0, 1.02]))]
    assert min(losses) == losses[1]


def test_the_likelihood_is_that_of_scikit_learn_and_of_the_formula():
    log_p, labels = drawn(200, 4, 1.0)
    for temperature, uniform in ((0.5, 0.0), (1.0, 0.0), (3.0, 0.2)):
        by = CalibrationMap(temperature=temperature, uniform=uniform)
        probabilities = calibrated(torch.as_tensor(log_p), by).numpy()
        ours = negative_log_likelihood(log_p, labels, by)
        assert ours == pytest.approx(log_loss(labels, probabilities, labels=range(4)))
        assert ours == pytest.approx(literal_loss(log_p, labels, temperature, uniform))


def test_only_correct_predictions_give_the_end_of_the_range_and_chance_the_largest_uniform_part():
    log_p, _ = drawn(50, 3, 1.0)
    fitted = fit_map(log_p, log_p.argmax(axis=1))
    assert fitted.temperature == pytest.approx(RANGE[0], rel=0.01)
    assert fitted.uniform == 0
    wrong = fit_map(log_p, log_p.argmin(axis=1))
    assert wrong.temperature > 500 or wrong.uniform == MAX_UNIFORM


def test_an_impossible_class_has_a_loss_and_a_fit():
    """p = 0 for the true class: only the uniform part makes the loss finite."""
    log_p = np.log(np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]) + np.array([0.0, 1e-320]))
    fitted = fit_map(log_p, np.array([0, 1, 1]))
    assert np.isfinite(negative_log_likelihood(log_p, np.array([0, 1, 1]), fitted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 0.4, MAX_UNIFORM])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0, 20.0])
def test_no_prediction_changes(dtype, temperature, uniform):
    """Also where two classes have almost or exactly the same probability, and where one underflows."""
    torch.manual_seed(0)
    support, query = torch.randn(40, 4, 2, 3, dtype=dtype), 5 * torch.randn(40, 30, 2, 3, dtype=dtype)
    support[:, 1] = support[:, 0]  # a class twice: exactly equal
    support[:, 3] = support[:, 2] * (1 + torch.finfo(dtype).eps)
    adapt = AdaptSettings(e_step="identity", final_covariance="identity", iterations=3, samples=2)
    _, log_p = fit_log_posteriors(adapt, support, query)
    probabilities = calibrated(log_p, UNCALIBRATED)
    q = calibrated(log_p, CalibrationMap(temperature=temperature, uniform=uniform))
    # Of classes that differ in the last bit the maximum may be shared, so not every argmax is the same index.
    assert torch.equal(q.gather(2, log_p.argmax(dim=2, keepdim=True)), q.amax(dim=2, keepdim=True))
    predicted, largest = probabilities.gather(2, q.argmax(dim=2, keepdim=True)), probabilities.amax(dim=2, keepdim=True)
    torch.testing.assert_close(predicted, largest, rtol=1e-12, atol=0)
    torch.testing.assert_close(q.sum(dim=2), torch.ones(40, 30, dtype=torch.float64))
    assert (q >= uniform / 4 - 1e-15).all()


def test_probabilities_that_underflow_keep_their_differences():
    """p^(1/T) of e^-200 and e^-400 at T = 100: float32 probabilities would both be 0."""
    support, query = torch.tensor([[[[0.0]], [[20.0]], [[28.2842712]]]]), torch.tensor([[[[0.0]]]])
    adapt = AdaptSettings(e_step="identity", final_covariance="identity", samples=1)
    _, log_p = fit_log_posteriors(adapt, support, query, fit_on_queries=False)
    expected = softmax(np.array([0.0, -200.0, -400.0]) / 100)
    by = CalibrationMap(temperature=100.0)
    np.testing.assert_allclose(calibrated(log_p, by)[0, 0].numpy(), expected, rtol=1e-4)
    by = CalibrationMap(temperature=100.0, uniform=0.3)
    np.testing.assert_allclose(calibrated(log_p, by)[0, 0].numpy(), 0.7 * expected + 0.1, rtol=1e-4)


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
