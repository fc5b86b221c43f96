"""Weights of classes that give each of them the same number of queries: Sinkhorn's iteration (Cuturi, NeurIPS 2013).

Notation: E episodes, P unlabelled points, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metagmvae.training.objectives.mixture import with_background

ITERATIONS = 100
TOLERANCE = 1e-2
"""Largest relative error of the number of points of a class."""
FAR = 10.0
"""Change of a log weight after which the responsibilities are computed anew: factors from them would lose accuracy."""
FEWEST = 1e-25
"""Points of a class below which a step counts this many: its factor stays finite in float32."""


def balancing_weights(
    background: float | None, logits_EPK: Tensor, start_EK: Tensor | None = None, iterations: int = ITERATIONS
) -> Tensor:
    """Return log weights, (E, K), that added to the logits give all classes equally many points.

    With r(p, k) the softmax of logits(p, k) + weights(k) over k, the sum of r over the points is the same for every k,
    up to `TOLERANCE`, or what the iterations reach. A background component takes part in the softmax, and its points
    count for no class. The iteration of an episode ends when it has converged, whatever the others do.

    Args:
        background: logit of the background component of `fit_semi_supervised`; None: none.
        logits_EPK: log-likelihoods of the classes.
        start_EK: weights to begin with; None: zero.
        iterations: at most.
    """
    # With the points as the last axis, and sums over classes and points as products with rows, a step takes half the
    # time on a CPU.
    logits_EKP, K = logits_EPK.mT, logits_EPK.shape[2]
    base_EK = torch.zeros_like(logits_EPK[:, 0]) if start_EK is None else start_EK
    factor_EK, resp_EKP = torch.ones_like(base_EK), _responsibilities(background, logits_EKP, base_EK)
    for _ in range(iterations):
        # The softmax at other weights is that at the base times factors of the classes: two products instead of exp.
        sum_E1P = with_background(factor_EK, None if background is None else 1.0, dim=1)[:, None] @ resp_EKP
        total_EK = factor_EK * (sum_E1P.reciprocal() @ resp_EKP[:, :K].mT).squeeze(1).clamp_min(FEWEST)
        share_EK = total_EK / total_EK.mean(dim=1, keepdim=True)
        open_EK = (share_EK - 1).abs() > TOLERANCE
        if not open_EK.any():
            break
        factor_EK = torch.where(open_EK.any(dim=1, keepdim=True), factor_EK / share_EK, factor_EK)
        far_EK = factor_EK.log().abs() > FAR
        if far_EK.any():
            far_E1 = far_EK.any(dim=1, keepdim=True)
            base_EK = torch.where(far_E1, base_EK + factor_EK.log(), base_EK)
            factor_EK = torch.where(far_E1, 1.0, factor_EK)
            resp_EKP = torch.where(far_E1[..., None], _responsibilities(background, logits_EKP, base_EK), resp_EKP)
    return base_EK + factor_EK.log()


def _responsibilities(background: float | None, logits_EKP: Tensor, weight_EK: Tensor) -> Tensor:
    """Softmax of the weighted logits over the classes, (E, K, P), with a last row for the background component."""
    return torch.softmax(with_background(logits_EKP + weight_EK[..., None], background, dim=1), dim=1)
