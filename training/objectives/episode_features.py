"""What is done to the features of an episode before its classes are fitted to them.

Notation: E episodes, T labelled points, P queries, F feature size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.objectives.class_whitening import whiten_classes
from metagmvae.training.objectives.feature_diffusion import diffuse_features


def adapt_features(
    adapt: AdaptSettings, support_ETF: Tensor, label_T: Tensor, query_EPF: Tensor, *, transductive: bool
) -> tuple[Tensor, Tensor]:
    """Whiten the features of support and queries within classes, then diffuse them, if the settings say so.

    Args:
        adapt: `whitening`, and `diffusion`, which is for transductive episodes.
        support_ETF, label_T, query_EPF: as in `whiten_classes`.
        transductive: whether the queries may change each other's features.
    """
    support_ETF, query_EPF = whiten_classes(support_ETF, label_T, query_EPF, adapt.whitening)
    if adapt.diffusion and transductive:
        h_EMF = diffuse_features(torch.cat([support_ETF, query_EPF], dim=1), adapt.diffusion)
        support_ETF, query_EPF = h_EMF.split([support_ETF.shape[1], query_EPF.shape[1]], dim=1)
    return support_ETF, query_EPF
