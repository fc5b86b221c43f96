"""Transductive assignments of the queries of an episode to the classes, from features alone.

Features are centred on the mean of the episode and normalised to length 1.

Notation: E episodes, F features, K ways, S shots, P queries of an episode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.objectives.balanced_classes import balancing_weights

SINKHORN_ITERATIONS = 1000
PROTOTYPE_STEPS = 20
PROTOTYPE_RATE = 0.2
"""Part of the way from the old prototype to the new one in a step; 20 steps of 0.2 are the values of PT-MAP."""
BOUND_UPDATES = 20


def soft_k_means_cosines(
    support_EKSF: Tensor,
    query_EPF: Tensor,
    temperature: float = 20.0,
    iterations: int = 10,
    mask_EKS: Tensor | None = None,
) -> Tensor:
    """Return the cosines of the queries to the class means of soft k-means, (E, P, K) (Ren et al., ICLR 2018).

    Args:
        support_EKSF: labelled vectors by class.
        query_EPF: vectors of the queries.
        temperature: assignments are the softmax of `temperature` times the cosine to each class mean.
        iterations: number of refinements of the means.
        mask_EKS: 0 where the support is padded with zeros, because classes have different shots, and else 1.
    """
    support_EKSF, query_EPF, count_EK1 = _normalised(support_EKSF, query_EPF, mask_EKS)
    mean_EKF = support_EKSF.sum(dim=2) / count_EK1
    for _ in range(iterations):
        soft_EPK = torch.softmax(temperature * _cosines(query_EPF, mean_EKF), dim=2)
        total_EKF = support_EKSF.sum(dim=2) + soft_EPK.transpose(1, 2) @ query_EPF
        mean_EKF = total_EKF / (count_EK1 + soft_EPK.sum(dim=1)[..., None])
    return _cosines(query_EPF, mean_EKF)


def optimal_transport_posterior(
    support_EKSF: Tensor, query_EPF: Tensor, sharpness: float = 10.0, mask_EKS: Tensor | None = None
) -> Tensor:
    """Return the transport plan from queries to prototypes as class probabilities, (E, P, K) float64.

    In each of 20 steps the plan assigns the queries, and each prototype moves a part of the way to the mean of its
    support and of the queries in proportion to their assignment (PT-MAP: Hu et al., ICANN 2021, Algorithm 1; without
    its power transform, which needs features above 0). SAMPTransfer (Shirekar et al., WACV 2023) moves the prototypes
    by such a plan too. The plan gives every class P / K queries: it assumes that the queries are balanced.

    Args:
        support_EKSF, query_EPF, mask_EKS: as in `soft_k_means_cosines`.
        sharpness: multiplies the squared distances: the inverse of the weight of the entropy of the plan.
    """
    support_EKSF, query_EPF, count_EK1 = _normalised(support_EKSF, query_EPF, mask_EKS)
    total_EKF = support_EKSF.sum(dim=2)
    prototype_EKF = total_EKF / count_EK1
    plan_EPK, weight_EK = _sinkhorn(_squared_distances(query_EPF, prototype_EKF), sharpness, None)
    for _ in range(PROTOTYPE_STEPS):
        weight_EKP = plan_EPK.transpose(1, 2).to(query_EPF.dtype)
        new_EKF = (total_EKF + weight_EKP @ query_EPF) / (count_EK1 + weight_EKP.sum(dim=2, keepdim=True))
        prototype_EKF = prototype_EKF + PROTOTYPE_RATE * (new_EKF - prototype_EKF)
        # From the weights of the step before, which is faster and ends at the same plan.
        plan_EPK, weight_EK = _sinkhorn(_squared_distances(query_EPF, prototype_EKF), sharpness, weight_EK)
    return plan_EPK


def sinkhorn(cost_EPK: Tensor, sharpness: float) -> Tensor:
    """Return the plan of the smallest cost minus entropy / sharpness with equal marginals, (E, P, K) float64.

    Each query is assigned once, so that rows sum to 1; each class gets P / K queries, up to the tolerance of
    `balancing_weights`. The iteration of an episode ends when it has converged, whatever the others do.

    Args:
        cost_EPK: cost of each query and class.
        sharpness: above 0.
    """
    return _sinkhorn(cost_EPK, sharpness, None)[0]


def _sinkhorn(cost_EPK: Tensor, sharpness: float, weight_EK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the plan of `sinkhorn` and the log weights of its columns; `weight_EK` are those to begin with."""
    logits_EPK = -sharpness * cost_EPK.double()
    weight_EK = balancing_weights(None, logits_EPK, weight_EK, iterations=SINKHORN_ITERATIONS)
    return torch.softmax(logits_EPK + weight_EK[:, None], dim=2), weight_EK


def laplacian_logits(
    support_EKSF: Tensor, query_EPF: Tensor, weight: float = 0.7, neighbours: int = 3, mask_EKS: Tensor | None = None
) -> Tensor:
    """Return the logits of the assignments of LaplacianShot, (E, P, K) (Ziko et al., ICML 2020, Algorithm 1).

    A query is drawn to the nearest class mean, by the squared distance a(q, k), and to the classes of its nearest
    queries. The update that minimises the paper's bound of this objective,

        y(q, k) = exp(-a(q, k) + weight * sum of y(p, k) over the neighbours p of q) / sum of the same over k,

    is made 20 times, from the softmax of -a. Without the paper's rectification of the prototypes.

    Args:
        support_EKSF, query_EPF, mask_EKS: as in `soft_k_means_cosines`.
        weight: of the neighbours; 0: the nearest class mean.
        neighbours: of each query, among the other queries.
    """
    support_EKSF, query_EPF, count_EK1 = _normalised(support_EKSF, query_EPF, mask_EKS)
    mean_EKF = F.normalize(support_EKSF.sum(dim=2) / count_EK1, dim=2)
    unary_EPK = _squared_distances(query_EPF, mean_EKF)
    cosine_EPP = query_EPF @ query_EPF.transpose(1, 2)
    cosine_EPP.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = cosine_EPP.topk(min(neighbours, query_EPF.shape[1] - 1), dim=2).indices
    near_EPP = torch.zeros_like(cosine_EPP).scatter_(2, nearest, 1.0)
    logits_EPK = -unary_EPK
    for _ in range(BOUND_UPDATES):
        logits_EPK = weight * (near_EPP @ torch.softmax(logits_EPK, dim=2)) - unary_EPK
    return logits_EPK


def _normalised(support_EKSF: Tensor, query_EPF: Tensor, mask_EKS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred and normalised support (0 where it is padded) and queries, and the shots, (E, K, 1)."""
    mask_EKS = support_EKSF.new_ones(support_EKSF.shape[:3]) if mask_EKS is None else mask_EKS
    count_EK1, points_E11 = mask_EKS.sum(dim=2)[..., None], mask_EKS.sum(dim=(1, 2))[:, None, None] + query_EPF.shape[1]
    centre_E1F = torch.cat([support_EKSF.flatten(1, 2), query_EPF], dim=1).sum(dim=1, keepdim=True) / points_E11
    support_EKSF = F.normalize(support_EKSF - centre_E1F[:, None], dim=-1) * mask_EKS[..., None]
    return support_EKSF, F.normalize(query_EPF - centre_E1F, dim=-1), count_EK1


def _cosines(query_EPF: Tensor, mean_EKF: Tensor) -> Tensor:
    """Cosines of normalised queries to class means, (E, P, K)."""
    return query_EPF @ F.normalize(mean_EKF, dim=2).transpose(1, 2)


def _squared_distances(query_EPF: Tensor, mean_EKF: Tensor) -> Tensor:
    """Squared distances of normalised queries to class means, (E, P, K)."""
    return 1 + mean_EKF.square().sum(dim=2)[:, None] - 2 * query_EPF @ mean_EKF.transpose(1, 2)
