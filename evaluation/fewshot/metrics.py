"""Mean with confidence interval, and calibration of predicted probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

BINS = 15


@dataclass
class Reliability:
    """Reliability diagram: queries in bins of equal width by the confidence of their predicted class.

    Confidence is the probability of the predicted class (Guo et al., ICML 2017). Predictions are added in batches.
    """

    count: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Number of queries in each bin, (bins,)."""
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    """Sum of their confidences, (bins,)."""
    correct: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Number of correct predictions, (bins,)."""

    def add(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Add the predictions (n, K) for queries of classes (n,)."""
        confidence = probabilities.max(axis=1).astype(np.float64)
        correct = probabilities.argmax(axis=1) == labels
        # Rounding can lift a probability slightly above 1.
        bin_of = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
        self.count += np.bincount(bin_of, minlength=BINS)
        self.confidence += np.bincount(bin_of, weights=confidence, minlength=BINS)
        self.correct += np.bincount(bin_of[correct], minlength=BINS)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (ECE): mean over queries of |accuracy - confidence| of their bin."""
        return float(np.abs(self.correct - self.confidence).sum() / self.count.sum())

    @property
    def mean_confidence(self) -> float:
        """Mean confidence over all queries."""
        return float(self.confidence.sum() / self.count.sum())

    def summary(self) -> dict[str, Any]:
        """Return plain values: ECE, mean confidence, and queries, confidence and accuracy of each non-empty bin."""
        filled = self.count > 0
        bins = zip(self.count[filled], self.confidence[filled], self.correct[filled], strict=True)
        return {
            "ece": self.calibration_error,
            "confidence": self.mean_confidence,
            "bins": [
                {"queries": int(count), "confidence": float(confidence / count), "accuracy": float(correct / count)}
                for count, confidence, correct in bins
            ],
        }


def mean_ci95(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean and the half-width of its 95% confidence interval, 1.96 * std / sqrt(n).

    Args:
        values: one number per episode, (n,); std is the sample standard deviation (n - 1). One value has no interval:
            None.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("the mean of no values is undefined; give at least one")
    interval = float(1.96 * values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else None
    return float(values.mean()), interval
