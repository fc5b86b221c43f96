"""Confidence interval and calibration against closed forms and loops."""

import numpy as np
import pytest

from metagmvae.evaluation.fewshot.metrics import BINS, Reliability, mean_ci95


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    result = Reliability()
    result.add(probabilities, labels)
    return result


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Sum over bins of fraction of queries * |accuracy - confidence|, as Guo et al. (ICML 2017) define it."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = 0.0
    for number in np.unique(bin_of):
        inside = bin_of == number
        error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(error)


def test_mean_and_interval_against_closed_forms():
    assert mean_ci95(np.array([0.0, 1.0])) == (0.5, pytest.approx(1.96 * np.sqrt(0.5) / np.sqrt(2)))
    assert mean_ci95(np.array([0.25])) == (0.25, None), "one value has no interval"
    with pytest.raises(ValueError, match="at least one"):
        mean_ci95(np.array([]))


def test_calibration_error_against_closed_forms():
    certain = np.array([[1.0, 0.0]] * 4)
    assert reliability(certain, np.array([0, 0, 0, 1])).calibration_error == pytest.approx(0.25)
    assert reliability(certain, np.zeros(4, int)).calibration_error == 0.0
    even = np.array([[0.5, 0.5]] * 4)  # no query in the bins above, of any kind
    assert reliability(even, np.array([0, 1, 1, 1])).calibration_error == pytest.approx(0.25)
    assert reliability(even, np.ones(4, int)).mean_confidence == 0.5
    above_one_by_rounding = np.array([[1.0000001, 0.0]])
    assert reliability(above_one_by_rounding, np.array([0])).calibration_error == pytest.approx(0, abs=1e-6)


def test_calibration_error_in_batches_equals_the_loop_over_all_queries():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.full(5, 0.3), 3000), rng.integers(0, 5, 3000)
    collected = Reliability()
    for first in range(0, 3000, 700):
        collected.add(probabilities[first : first + 700], labels[first : first + 700])
    assert collected.calibration_error == pytest.approx(expected_calibration_error(probabilities, labels))
    summary = collected.summary()
    assert summary["ece"] == collected.calibration_error
    assert sum(row["queries"] for row in summary["bins"]) == 3000
