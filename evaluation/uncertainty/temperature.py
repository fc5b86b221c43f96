"""The temperature that calibrates probabilities: fitted to minimise the negative log-likelihood of the true classes.

Notation: n queries, K classes.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

RANGE = (0.05, 1000.0)
"""Temperatures that are considered. Without the lower end, queries that are all classified correctly would give 0."""


def negative_log_likelihood(log_p_nK: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return -1/n sum_i log q_i(y_i) in nats, for q_i(k) = p_i(k)^(1/temperature) / sum_j p_i(j)^(1/temperature).

    Args:
        log_p_nK: log-probabilities.
        labels: the true classes, (n,).
        temperature: above 0.
    """
    log_q_nK = log_softmax(log_p_nK / temperature, axis=1)
    return float(-log_q_nK[np.arange(len(labels)), labels].mean())


def fit_temperature(log_p_nK: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature in `RANGE` of the smallest negative log-likelihood (Guo et al., ICML 2017).

    The likelihood is a convex function of 1/temperature (that of a multinomial logit model with one coefficient), so
    the bounded search of Brent, in the logarithm of the temperature, finds its only minimum.

    Args:
        log_p_nK: log-probabilities.
        labels: the true classes, (n,).
    """
    log_temperature = minimize_scalar(
        lambda value: negative_log_likelihood(log_p_nK, labels, math.exp(value)),
        bounds=np.log(RANGE),
        method="bounded",
        options={"xatol": 1e-5},
    ).x
    return math.exp(log_temperature)
