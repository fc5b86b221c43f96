"""The Monte Carlo objective of Eq. 3 and 9, under the mixture that EM fits to the very same samples.

Notation: B episodes, M points, N Monte Carlo samples, R <= N decoded samples, K components, D latent size.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.objectives.mixture import Mixture, mixture_log_prob

CALIBRATION_FLOOR = 1e-6
"""Smallest calibrated variance: a perfect reconstruction would otherwise have infinite likelihood."""


Likelihood = Literal["bernoulli", "calibrated", "unit"]
"""Of pixels; of features with the variance that is best for the episode; of features with variance 1."""


class ElboTerms(NamedTuple):
    """Terms of the lower bound of each point, averaged over its samples, in nats: (B, M) each.

    elbo = reconstruction + prior + entropy.
    """

    reconstruction: Tensor
    """1/R sum_r log p(x | z^(r))."""
    prior: Tensor
    """1/N sum_n log p_psi*(z^(n))."""
    entropy: Tensor
    """-1/N sum_n log q(z^(n) | x, D)."""

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction + self.prior + self.entropy


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x | z), the sum of x log p + (1 - x) log(1 - p), p = sigmoid(logits): (n, ...) -> (n,)."""
    loss = F.binary_cross_entropy_with_logits(at_least_float32(logits), x, reduction="none")
    return -loss.flatten(1).sum(dim=1)


def calibrated_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """log N(x; mean, s^2 I) with the variance that is best for the episode: (B, P, F) twice -> (B, P).

    s^2 is the mean squared error over the points and dimensions of an episode, its maximum-likelihood value
    (Rybkin et al. 2020, "optimal sigma"), and carries gradient as they define it. One variance for each
    episode, not for the batch: an episode stays atomic, so ranks need not talk to each other.
    """
    error = (x - at_least_float32(mean)).square()
    variance = error.mean(dim=(1, 2), keepdim=True).clamp_min(CALIBRATION_FLOOR)
    return -0.5 * (error / variance + variance.log() + math.log(2 * math.pi)).sum(dim=2)


def unit_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """log N(x; mean, I) up to its constant: half the summed squared error (row 6), (B, P, F) twice -> (B, P)."""
    return -0.5 * (x - at_least_float32(mean)).square().sum(dim=2)


def gaussian_log_prob(noise: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mu, sigma^2) at z = mu + sigma * noise, in terms of the noise: (..., D) -> (...)."""
    return -0.5 * (noise.square() + log_variance + math.log(2 * math.pi)).sum(dim=-1)


def lower_bound(
    x: Tensor,
    logits: Tensor,
    z_BMND: Tensor,
    noise_BMND: Tensor,
    log_variance_BMD: Tensor,
    mixture: Mixture,
    likelihood: Likelihood = "bernoulli",
) -> ElboTerms:
    """The bound of Eq. 3 for every point of every episode.

    EM and both densities use all N samples. Only the first R are decoded: the samples of a point are
    exchangeable (psi* is a symmetric function of them), so the expectation does not depend on R. This holds
    as far as a sample is decoded by itself: in training mode the decoder of images normalises over all B*M*R
    maps, and the calibrated variance of features is the mean over the R decoded samples of the episode.

    Args:
        x: images in [0, 1], (B*M, C, H, W), or features, (B*M, F).
        logits: decoded samples, (B*M*R, ...), sample fastest: logits of pixels or means of features.
        z_BMND: samples; noise_BMND: the standard normal draws behind them.
        log_variance_BMD: of q(z | x, D).
        mixture: psi*, constant for the gradient.
        likelihood: see `Likelihood`.
    """
    B, M, _, _ = z_BMND.shape
    decoded = logits.shape[0] // (B * M)
    target = x if decoded == 1 else x.repeat_interleave(decoded, dim=0)
    if likelihood == "bernoulli":
        log_likelihood = bernoulli_log_prob(target, logits)
    else:
        log_prob = calibrated_log_prob if likelihood == "calibrated" else unit_log_prob
        log_likelihood = log_prob(target.unflatten(0, (B, -1)), logits.unflatten(0, (B, -1)))
    reconstruction = log_likelihood.view(B, M, decoded).mean(dim=2)
    prior = mixture_log_prob(mixture, z_BMND.flatten(1, 2)).view(z_BMND.shape[:3]).mean(dim=2)
    log_q = gaussian_log_prob(noise_BMND, log_variance_BMD.unsqueeze(2)).mean(dim=2)
    return ElboTerms(reconstruction, prior, -log_q)


def objective(terms: ElboTerms, scale: str, beta: float = 1.0) -> Tensor:
    """Eq. 9, to be maximised: mean over episodes of the sum over points, or of their mean (row 11).

    `beta` weighs the divergence from the prior, -(prior + entropy), against the reconstruction (Higgins et al., ICLR
    2017); at 1 this is the lower bound.
    """
    points = terms.reconstruction + beta * (terms.prior + terms.entropy)
    return (points.sum(dim=1) if scale == "sum" else points.mean(dim=1)).mean()
