"""Scaling of encoder features: one scale, or whitening."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.training.device.precision import at_least_float32

FLOOR = 1e-3
"""Share of the largest deviation below which one is taken for noise: whitening adds it to each before it divides."""


class FeatureScale(nn.Module):
    """Bring features to one scale: centred, divided by their deviation, then each of length sqrt(F).

    A contrastive loss gives meaning to the direction of a feature only; its length would otherwise decide
    how sharply EM with unit covariance tells components apart. The statistics are those of the training
    images under the warmed-up encoder, set once and kept as buffers.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Take mean and deviation of raw features, (F,) each; a dimension that never varies stays as it is."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, h: Tensor) -> Tensor:
        centred = (at_least_float32(h) - self.mean) / self.deviation
        return F.normalize(centred, dim=-1) * math.sqrt(h.shape[-1])


class FeatureWhitening(nn.Module):
    """Bring features to one scale: square root, unit length, half-whitened, of length sqrt(F).

    Features of a contrastive encoder are skewed (a few large values on many small ones) and lie in a cone; their
    length means nothing. The square root evens values out (the power transform of Hu et al., ICANN 2021), centring
    takes the cone away, and multiplying by the covariance to the power of -1/4 goes half the way to whitening, so
    that a few directions do not decide the distances of EM. The statistics are those of the training images under
    the frozen encoder, set once and kept as buffers.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whitening", torch.eye(features))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, covariance: Tensor) -> None:
        """Take mean and covariance of `even_out(h)`, (F,) and (F, F), float64 for a stable decomposition."""
        variance, basis = torch.linalg.eigh(covariance)
        deviation = variance.clamp_min(0).sqrt()
        # A direction that hardly varies is noise: it is not blown up. All zero: nothing to whiten by.
        floored = deviation + FLOOR * deviation.amax()
        factor = torch.where(floored > 0, floored, 1.0).rsqrt()
        self.mean.copy_(mean)
        self.whitening.copy_((basis * factor) @ basis.T)

    def forward(self, h: Tensor) -> Tensor:
        centred = (whiten(at_least_float32(h)) - self.mean) @ self.whitening
        return F.normalize(centred, dim=-1) * math.sqrt(h.shape[-1])


def whiten(h: Tensor) -> Tensor:
    """Square root of each value, its sign kept, and unit length: (..., F) -> (..., F)."""
    return F.normalize(h.sign() * h.abs().sqrt(), dim=-1)
