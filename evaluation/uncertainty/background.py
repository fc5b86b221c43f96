"""The level of the background component, which takes the queries of no labelled class, chosen on open episodes.

Notation: n queries, K classes; column K is the background.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp

Classify = Callable[[float], tuple[np.ndarray, np.ndarray]]
"""Background level -> log-probabilities (n, K + 1), and classes (n,), K for a query of no labelled class."""
LEVELS = 9
"""Levels that each round of the search tries."""
ROUNDS = 3
QUANTILES = (0.005, 0.995)


def known_score(log_p_nK1: np.ndarray) -> np.ndarray:
    """Return log p(some labelled class) - log p(background) of each query, (n,): high for a known class."""
    return logsumexp(log_p_nK1[:, :-1], axis=1) - log_p_nK1[:, -1]


def search_background(classify: Classify) -> tuple[float, np.ndarray, np.ndarray]:
    """Find the level of the highest accuracy over K + 1 classes, by a search on ever finer grids.

    The first grid spans the log densities of the queries under the labelled classes, which are found as the level plus
    `known_score`. Each further grid spans the neighbours of the best level so far; the first of equal levels wins.

    Returns:
        The level, and what `classify` returns at it.
    """
    log_p_nK1, labels = classify(0.0)
    low, high = np.quantile(known_score(log_p_nK1), QUANTILES)
    best = (-1.0, 0.0, log_p_nK1)
    for _ in range(ROUNDS):
        levels = np.linspace(low, high, LEVELS)
        for level in levels:
            log_p_nK1, _ = classify(float(level))
            accuracy = float((log_p_nK1.argmax(axis=1) == labels).mean())
            if accuracy > best[0]:
                best = (accuracy, float(level), log_p_nK1)
        step = (high - low) / (LEVELS - 1)
        low, high = best[1] - step, best[1] + step
    return best[1], best[2], labels
