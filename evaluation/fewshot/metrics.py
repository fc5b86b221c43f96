"""How far a model's probabilities can be believed, collected batch by batch: reliability and its error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

BINS = 15


@dataclass
class Reliability:
    """Queries by the confidence of their predicted class, in bins of equal width (Guo et al., ICML 2017)."""

    count: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Queries in each bin, (bins,)."""
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    """Sum of their confidences."""
    right: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """How many of them were right."""

    def add(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Take in the predictions (n, K) for queries of classes (n,)."""
        sure = probabilities.max(axis=1).astype(np.float64)
        right = probabilities.argmax(axis=1) == labels
        # Rounding can lift a probability a hair above 1.
        bin_of = np.clip((sure * BINS).astype(int), 0, BINS - 1)
        self.count += np.bincount(bin_of, minlength=BINS)
        self.confidence += np.bincount(bin_of, weights=sure, minlength=BINS)
        self.right += np.bincount(bin_of[right], minlength=BINS)

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over queries of |accuracy - confidence| of their bin."""
        return float(np.abs(self.right - self.confidence).sum() / self.count.sum())

    @property
    def mean_confidence(self) -> float:
        return float(self.confidence.sum() / self.count.sum())

    def summary(self) -> dict[str, Any]:
        """As plain values: the error, and for each bin that is not empty its queries, confidence and accuracy."""
        filled = self.count > 0
        return {
            "ece": self.error,
            "confidence": self.mean_confidence,
            "bins": [
                {"queries": int(n), "confidence": float(total / n), "accuracy": float(right / n)}
                for n, total, right in zip(self.count[filled], self.confidence[filled], self.right[filled], strict=True)
            ],
        }


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
