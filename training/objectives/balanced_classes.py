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
    for _ in range(iterations):
        resp_EPK = torch.softmax(with_background(logits_EPK + weight_EK[:, None], background), dim=2)[..., :K]
        total_EK = resp_EPK.sum(dim=1).clamp_min(torch.finfo(resp_EPK.dtype).tiny)
        share_EK = total_EK / total_EK.mean(dim=1, keepdim=True)
        open_E1 = ((share_EK - 1).abs() > TOLERANCE).any(dim=1, keepdim=True)
        if not open_E1.any():
            break
        weight_EK = torch.where(open_E1, weight_EK - share_EK.log(), weight_EK)
    return weight_EK
