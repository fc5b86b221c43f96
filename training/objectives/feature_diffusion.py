"""Diffusion of the features of an episode: set attention without weights, over the support and the queries.

Notation: E episodes, M = T + P points of an episode (support and queries), F feature size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 20.0
"""Multiplies the cosines in the kernel. Of 10 and 20 the better one on the validation classes of Mini-ImageNet."""


def diffuse_features(h_EMF: Tensor, weight: float) -> Tensor:
    """Move every point of a set towards the points that are like it: (E, M, F) -> (E, M, F), of length sqrt(F).

    With c the features, centred on their mean over the set, the result is y = (I - weight S)^-1 c, the limit of
    y <- c + weight S y: infinitely many layers of self-attention with a residual connection. Its weights are those of a
    symmetric kernel without the point itself,

        S = D^-1/2 A D^-1/2,  A(i, j) = exp(SHARPNESS (cos(c_i, c_j) - 1)),  A(i, i) = 0,  D(i, i) = sum_j A(i, j)

    (Zhou et al., NeurIPS 2003; for few-shot episodes: Rodriguez et al., ECCV 2020). Features are scaled to length 1
    before and after each centring.

    Args:
        h_EMF: scaled features of sets of at least 2 points.
        weight: in [0, 1); 0: the features are only centred.
    """
    c_EMF = F.normalize(h_EMF, dim=2)
    c_EMF = F.normalize(c_EMF - c_EMF.mean(dim=1, keepdim=True), dim=2)
    kernel_EMM = (SHARPNESS * (c_EMF @ c_EMF.mT - 1)).exp()
    kernel_EMM.diagonal(dim1=1, dim2=2).zero_()
    scale_EM = kernel_EMM.sum(dim=2).rsqrt()
    kernel_EMM = scale_EM[:, :, None] * kernel_EMM * scale_EM[:, None]
    identity_MM = torch.eye(h_EMF.shape[1], dtype=h_EMF.dtype, device=h_EMF.device)
    y_EMF = torch.linalg.solve(identity_MM - weight * kernel_EMM, c_EMF)
    return F.normalize(y_EMF - y_EMF.mean(dim=1, keepdim=True), dim=2) * math.sqrt(h_EMF.shape[2])
