"""The map that calibrates probabilities: fitted to minimise the negative log-likelihood of the true classes.

Notation: n queries, K classes, T temperature, u weight of the uniform distribution.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax

from metagmvae.training.models.posterior_calibration import CalibrationMap

RANGE = (0.05, 1000.0)
"""Temperatures that are considered. Without the lower end, queries that are all classified correctly would give 0."""
GRID = 25
"""Temperatures of the first search, each about 1.5 times the one before."""
MAX_UNIFORM = 0.9
"""With u = 1 all classes would have the same probability."""
SMALLEST = 1e-300
"""Probabilities below this are taken for it, so that they have a logarithm."""


def negative_log_likelihood(log_p_nK: np.ndarray, labels: np.ndarray, by: CalibrationMap) -> float:
    """Return -1/n sum_i log q_i(y_i) in nats, for the probabilities q of `predict.calibrated`."""
    return _mixed_loss(_true_class(log_p_nK, labels, by.temperature), by.uniform, log_p_nK.shape[1])


def fit_map(log_p_nK: np.ndarray, labels: np.ndarray) -> CalibrationMap:
    """Return the map of the smallest negative log-likelihood, with T in `RANGE` and u in [0, `MAX_UNIFORM`].

    The likelihood is convex in u, the weight of a component of a mixture, and for u = 0 in 1/T, but not in both. So the
    best u is found for each T: of a grid first, then of Brent's bounded search between the neighbours of the best T.
    """
    K = log_p_nK.shape[1]

    def loss(log_temperature: float) -> float:
        p_n = _true_class(log_p_nK, labels, math.exp(log_temperature))
        return _mixed_loss(p_n, _best_uniform(p_n, K), K)

    grid = np.log(np.geomspace(*RANGE, GRID))
    best = int(np.argmin([loss(value) for value in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    temperature = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5}).x)
    return CalibrationMap(temperature=temperature, uniform=_best_uniform(_true_class(log_p_nK, labels, temperature), K))


def _true_class(log_p_nK: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probability of the true class at a temperature, (n,)."""
    return log_softmax(log_p_nK / temperature, axis=1)[np.arange(len(labels)), labels]


def _mixed_loss(log_p_n: np.ndarray, uniform: float, K: int) -> float:
    if uniform == 0:
        return float(-log_p_n.mean())
    return float(-np.log((1 - uniform) * np.exp(log_p_n) + uniform / K).mean())


def _best_uniform(log_p_n: np.ndarray, K: int) -> float:
    """Return the u of the smallest loss, where its derivative, mean_i (p_i - 1/K) / ((1 - u) p_i + u/K), is 0."""
    p_n = np.maximum(np.exp(log_p_n), SMALLEST)

    def slope(uniform: float) -> float:
        return float(((p_n - 1 / K) / ((1 - uniform) * p_n + uniform / K)).mean())

    if slope(0.0) >= 0:
        return 0.0
    return MAX_UNIFORM if slope(MAX_UNIFORM) <= 0 else float(brentq(slope, 0.0, MAX_UNIFORM))
