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
    weight_EK = torch.zeros_like(logits_EPK[:, 0]) if start_EK is None else start_EK
    K = logits_EPK.shape[2]
    base_EK, resp_EPK = weight_EK, _responsibilities(background, logits_EPK, weight_EK)
    for _ in range(iterations):
        # The softmax at other weights is that at the base times factors of the classes: two products instead of exp.
        factor_EK1 = (weight_EK - base_EK).exp()[..., None]
        sum_EP1 = resp_EPK[..., :K] @ factor_EK1 + resp_EPK[..., K:].sum(dim=2, keepdim=True)
        total_EK = (factor_EK1 * (resp_EPK[..., :K].mT @ sum_EP1.reciprocal()))[..., 0]
        total_EK = total_EK.clamp_min(torch.finfo(logits_EPK.dtype).tiny)
        share_EK = total_EK / total_EK.mean(dim=1, keepdim=True)
        open_E1 = ((share_EK - 1).abs() > TOLERANCE).any(dim=1, keepdim=True)
        if not open_E1.any():
            break
        weight_EK = torch.where(open_E1, weight_EK - share_EK.log(), weight_EK)
        far_E1 = ((weight_EK - base_EK).abs() > FAR).any(dim=1, keepdim=True)
        if far_E1.any():
            base_EK = torch.where(far_E1, weight_EK, base_EK)
            resp_EPK = torch.where(far_E1[..., None], _responsibilities(background, logits_EPK, base_EK), resp_EPK)
    return weight_EK


def _responsibilities(background: float | None, logits_EPK: Tensor, weight_EK: Tensor) -> Tensor:
    """Softmax of the weighted logits, with the background component as the last column if there is one."""
    return torch.softmax(with_background(logits_EPK + weight_EK[:, None], background), dim=2)
