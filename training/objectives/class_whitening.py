"""Whitening of the features of an episode by their covariance within classes, estimated from its labelled images.

Notation: E episodes, K classes, T labelled points, P queries, F feature size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def whiten_classes(support_ETF: Tensor, label_T: Tensor, query_EPF: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Multiply the features of an episode by Sigma^-1/2, Sigma the covariance that its classes share.

    With r_t the deviation of a labelled point from the mean of its class, n = T - K degrees of freedom, and
    v = sum_t |r_t|^2 / (n F), the mean variance of a dimension,

        Sigma is proportional to  nu v I + sum_t r_t r_t^T,  nu = F / strength

    This is the estimate of linear discriminant analysis under an inverse-Wishart prior: nu observations of the
    isotropic covariance v I. (Bayesian form of regularised discriminant analysis: Friedman, JASA 1989.) Directions in
    which images of one class differ then count less in all distances. A class with one labelled image adds nothing, and
    if all classes have one, the features stay as they are.

    Args:
        support_ETF: scaled features of the labelled images, of length sqrt(F).
        label_T: their classes, int64, 0 to K - 1, the same in all episodes; each class occurs.
        query_EPF: scaled features of the queries. They take no part in the estimate.
        strength: at least 0; 0: the features stay as they are.

    Returns:
        Support and queries, of length sqrt(F) again.
    """
    T, size = support_ETF.shape[1:]
    member_KT = F.one_hot(label_T).mT.to(support_ETF)
    freedom = T - len(member_KT)
    if not strength or not freedom:
        return support_ETF, query_EPF
    mean_EKF = (member_KT / member_KT.sum(dim=1, keepdim=True)) @ support_ETF
    rest_ETF = (support_ETF - mean_EKF[:, label_T]).double()
    mean_square_E = rest_ETF.square().sum(dim=(1, 2)) / freedom  # v F
    scale_E = torch.where(mean_square_E > 0, strength / mean_square_E, 0.0)
    if size < T:
        rest_ETF = torch.linalg.qr(rest_ETF, mode="r").R  # the same sum of r r^T in fewer rows
    # With R = sqrt(scale) r, Sigma is proportional to I + R^T R, and its inverse root is I - R^T W R: a function of the
    # small matrix R R^T.
    rest_ETF = rest_ETF * scale_E.sqrt()[:, None, None]
    value_ET, vector_ETT = torch.linalg.eigh(rest_ETF @ rest_ETF.mT)
    root_ET = (1 + value_ET.clamp_min(0)).sqrt()
    weight_ETT = vector_ETT / (root_ET * (1 + root_ET))[:, None] @ vector_ETT.mT
    left_EFT, right_EFT = (rest_ETF.mT @ weight_ETT).to(support_ETF), rest_ETF.mT.to(support_ETF)
    support_ETF, query_EPF = (
        F.normalize(h - (h @ right_EFT) @ left_EFT.mT, dim=2) * math.sqrt(size) for h in (support_ETF, query_EPF)
    )
    return support_ETF, query_EPF
