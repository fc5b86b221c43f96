"""Accuracy, its interval, and calibration: pure functions on arrays."""

from __future__ import annotations

import numpy as np


def mean_ci95(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95% interval, 1.96 * std / sqrt(n), as the field reports over episodes.

    Args:
        values: one number per episode, (n,); the standard deviation is the sample's (n - 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no values to take a mean of")
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return float(values.mean()), float(1.96 * deviation / np.sqrt(values.size))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the predicted class: sum over bins of share * |accuracy - confidence|.

    Args:
        probabilities: (n, K); labels: (n,).
        bins: equal-width bins of confidence (Guo et al., ICML 2017).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for number in range(bins):
        inside = bin_of == number
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(error)
