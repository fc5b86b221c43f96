"""Logistic regression of many small tasks at the same time, by Newton's method in the span of the labelled points.

Notation: E episodes, K classes, S shots, T = K * S labelled points, P queries, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metagmvae.pipelines.records import DataError

TOLERANCE = 1e-5
"""Largest norm of the gradient at the end; the error of a logit is about as large."""
NEWTON_STEPS = 100
CG_STEPS = 200
HALVINGS = 30


@torch.no_grad()
def logistic_regression_logits(
    support_EKSF: Tensor, query_EPF: Tensor, strength: float, mask_EKS: Tensor | None = None
) -> Tensor:
    """Fit a logistic regression to the support of each episode; return the logits of its queries, float64, (E, P, K).

    The fit minimises |W|^2 / 2 + strength * weighted sum of the cross-entropies, with biases without penalty, and such
    weights that classes of unequal shots count alike: for three classes or more scikit-learn's
    `LogisticRegression(C=strength, class_weight="balanced")`, and for two the same with half of the strength, as
    scikit-learn has one vector of weights then. W is a combination of the labelled points x, W = sum_t x_t a_t, so that
    a task has T * K unknowns, however many features. Each episode stops when it has converged, whatever the others do.

    Args:
        support_EKSF: labelled points by class; 0 where the mask is 0.
        query_EPF: points to classify.
        strength: C of scikit-learn, the inverse of the L2 penalty.
        mask_EKS: 1 for labelled points, 0 for padding, where classes differ in shots; None: no padding.

    Raises:
        DataError: the fit of an episode did not converge.
    """
    K, S = support_EKSF.shape[1:3]
    x_ETF = support_EKSF.flatten(1, 2).double()
    target_TK = torch.eye(K, dtype=x_ETF.dtype, device=x_ETF.device).repeat_interleave(S, dim=0)
    real_EKS = x_ETF.new_ones(support_EKSF.shape[:3]) if mask_EKS is None else mask_EKS.double()
    count_EK1 = real_EKS.sum(dim=2, keepdim=True)
    weight_EKS = real_EKS * count_EK1.sum(dim=1, keepdim=True) / (K * count_EK1)
    strength_ET1 = (strength / 2 if K == 2 else strength) * weight_EKS.flatten(1)[..., None]
    try:
        a_ETK, bias_E1K = _fit(x_ETF @ x_ETF.mT, target_TK, strength_ET1)
    except FloatingPointError as error:
        raise DataError(
            f"logistic regression with strength {strength:g} did not converge in {NEWTON_STEPS} steps: the features "
            "are too large or not finite"
        ) from error
    weights_EFK = (x_ETF.mT @ a_ETK).to(query_EPF.dtype)
    return (query_EPF @ weights_EFK).double() + bias_E1K


def _fit(gram_ETT: Tensor, target_TK: Tensor, strength_ET1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights a of the labelled points, (E, T, K), and the biases, (E, 1, K).

    With z = G a + b, p = softmax(z) and the strength C of each point, the gradient has the parts a + C (p - y) and
    sum_t C_t (p - y)_t, in the inner product <a, a'> = a^T G a' of vectors of weights W.

    Raises:
        FloatingPointError: no convergence.
    """
    a_ETK = gram_ETT.new_zeros(len(gram_ETT), *target_TK.shape)
    bias_E1K, z_ETK = torch.zeros_like(a_ETK[:, :1]), torch.zeros_like(a_ETK)  # z without the bias: G a
    for _ in range(NEWTON_STEPS):
        p_ETK = torch.softmax(z_ETK + bias_E1K, dim=2)
        error_ETK = strength_ET1 * (p_ETK - target_TK)
        gradient_a, gradient_b = a_ETK + error_ETK, error_ETK.sum(dim=1, keepdim=True)
        gram_gradient = gram_ETT @ gradient_a
        open_E = ~(_dot(gradient_a, gram_gradient, gradient_b, gradient_b) <= TOLERANCE**2)  # also where it is NaN
        if not open_E.any():
            return a_ETK, bias_E1K
        steps = _newton_step(gram_ETT, strength_ET1 * p_ETK, p_ETK, (gradient_a, gradient_b, gram_gradient))
        length_E = open_E.to(gram_ETT)
        old_E = _objective(a_ETK, bias_E1K, z_ETK, target_TK, strength_ET1)
        for _ in range(HALVINGS):
            new_a, new_bias, new_z = (
                value + length_E[:, None, None] * step
                for value, step in zip((a_ETK, bias_E1K, z_ETK), steps, strict=True)
            )
            worse_E = _objective(new_a, new_bias, new_z, target_TK, strength_ET1) > old_E + 1e-12 * old_E.abs()
            if not worse_E.any():
                break
            length_E = torch.where(worse_E, length_E / 2, length_E)
        a_ETK, bias_E1K, z_ETK = new_a, new_bias, new_z
    raise FloatingPointError


def _newton_step(
    gram_ETT: Tensor, scaled_p: Tensor, p_ETK: Tensor, gradient: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve H d = -gradient by conjugate gradients, to a tenth of the gradient or better near the end.

    Returns:
        The steps of a, of the biases, and of G a.
    """
    rest_a, rest_b, rest_z = (-part for part in gradient)
    step_a, step_b, step_z = torch.zeros_like(rest_a), torch.zeros_like(rest_b), torch.zeros_like(rest_z)
    way_a, way_b, way_z = rest_a, rest_b, rest_z
    norm_E = first_E = _dot(rest_a, rest_z, rest_b, rest_b)
    for _ in range(CG_STEPS):
        open_E = norm_E > first_E * first_E.clamp(1e-6, 1e-2)
        if not open_E.any():
            break
        change = way_z + way_b
        curved = scaled_p * (change - (p_ETK * change).sum(dim=2, keepdim=True))
        image_a, image_b = way_a + curved, curved.sum(dim=1, keepdim=True)
        image_z = gram_ETT @ image_a
        length = torch.where(open_E, norm_E / _dot(way_a, image_z, way_b, image_b), 0.0)[:, None, None]
        step_a, step_b, step_z = step_a + length * way_a, step_b + length * way_b, step_z + length * way_z
        rest_a, rest_b, rest_z = rest_a - length * image_a, rest_b - length * image_b, rest_z - length * image_z
        new_E = torch.where(open_E, _dot(rest_a, rest_z, rest_b, rest_b), norm_E)
        turn = torch.where(open_E, new_E / norm_E, 0.0)[:, None, None]
        way_a, way_b, way_z, norm_E = rest_a + turn * way_a, rest_b + turn * way_b, rest_z + turn * way_z, new_E
    return step_a, step_b, step_z


def _dot(a: Tensor, gram_a: Tensor, b: Tensor, other_b: Tensor) -> Tensor:
    """<a, a'> + b . b' of each episode, (E,); `gram_a` is G a'."""
    return (a * gram_a).sum(dim=(1, 2)) + (b * other_b).sum(dim=(1, 2))


def _objective(a_ETK: Tensor, bias_E1K: Tensor, z_ETK: Tensor, target_TK: Tensor, strength_ET1: Tensor) -> Tensor:
    """The minimised function of each episode, (E,)."""
    log_p_ETK = torch.log_softmax(z_ETK + bias_E1K, dim=2)
    return 0.5 * (a_ETK * z_ETK).sum(dim=(1, 2)) - (strength_ET1 * log_p_ETK * target_TK).sum(dim=(1, 2))
