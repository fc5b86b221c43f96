"""Scaling of encoder features: standardisation, or half-whitening by one of two covariances.

Notation: n features of size F. All modules return features of length sqrt(F).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.training.device.precision import at_least_float32

FLOOR = 1e-3
"""Standard deviations below this fraction of the largest one count as noise; whitening adds the floor to each."""


class FeatureScale(nn.Module):
    """Standardise features per dimension, then scale each feature vector to length sqrt(F): (n, F) -> (n, F).

    A contrastive loss trains only the direction of a feature vector. Its length would otherwise decide how sharply EM
    with unit covariance separates the components. The statistics are those of the training images under the
    pre-trained encoder: set once, then kept as buffers.
    """

    mean: Tensor
    deviation: Tensor
    """Standard deviation; the name is a key of stored checkpoints."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("deviation", torch.ones(feature_dim))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of the raw features, (F,) each; constant dimensions are only centred."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(std > 0, std, 1.0))

    def forward(self, h: Tensor) -> Tensor:
        centred = (at_least_float32(h) - self.mean) / self.deviation
        return F.normalize(centred, dim=-1) * math.sqrt(h.shape[-1])


class FeatureWhitening(nn.Module):
    """Square root, unit length, half-whitening, then length sqrt(F): (n, F) -> (n, F).

    Features of a contrastive encoder are skewed (few large values, many small ones), lie in a narrow cone, and their
    length means nothing. The square root reduces the skew (power transform of Hu et al., ICANN 2021), centring removes
    the cone, and multiplying by covariance^(-1/4), half of whitening, keeps a few directions from dominating the
    distances of EM. The statistics are those of the training images under the frozen encoder: set once, then kept as
    buffers.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("whitening", torch.eye(feature_dim))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, covariance: Tensor) -> None:
        """Set mean (F,) and covariance (F, F) of `transform(h)`; float64 for a stable eigendecomposition."""
        variance, basis = torch.linalg.eigh(covariance)
        std = variance.clamp_min(0).sqrt()
        # The floor keeps nearly constant directions, which are noise, from being amplified.
        floored = std + FLOOR * std.amax()
        factor = torch.where(floored > 0, floored, 1.0).rsqrt()
        self.mean.copy_(mean)
        self.whitening.copy_((basis * factor) @ basis.T)

    def forward(self, h: Tensor) -> Tensor:
        centred = (self.transform(at_least_float32(h)) - self.mean) @ self.whitening
        return F.normalize(centred, dim=-1) * math.sqrt(h.shape[-1])

    @staticmethod
    def transform(h: Tensor) -> Tensor:
        """Transform features before they are centred: signed square root, then unit length."""
        return F.normalize(h.sign() * h.abs().sqrt(), dim=-1)


class ViewWhitening(FeatureWhitening):
    """Unit length, half-whitening by the covariance within images, then length sqrt(F): (n, F) -> (n, F).

    `set_statistics` gets the mean of the features of the training images, and the covariance of the features of random
    views about the mean of their image. It estimates without labels the covariance within classes of linear
    discriminant analysis: directions that change between views of an image tell classes apart badly. Whitening by the
    covariance of all features (`FeatureWhitening`) also shrinks the directions that do tell them apart.
    """

    @staticmethod
    def transform(h: Tensor) -> Tensor:
        """Transform features before they are centred: unit length."""
        return F.normalize(h, dim=-1)
