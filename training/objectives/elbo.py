"""The Monte Carlo lower bound (Eq. 3) and the objective (Eq. 9) of Lee et al., ICLR 2021.

The prior is the mixture psi* that EM fits to the same samples (`training.objectives.mixture`).

Notation: B episodes per step, M data points per episode, N Monte Carlo samples, R <= N decoded samples, P = M * R
decoded points per episode, D latent size, F feature size; in q(z | x, D), D is the set.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.objectives.mixture import Mixture

CALIBRATION_FLOOR = 1e-6
"""Smallest calibrated variance: a perfect reconstruction would otherwise have infinite likelihood."""

Likelihood = Literal["bernoulli", "calibrated", "unit", "half"]
"""p(x | z): Bernoulli pixels, or Gaussian features with variance calibrated (paper), 1, or 1/2 (published code)."""
FIXED_VARIANCES = {"unit": 1.0, "half": 0.5}


class Prior(Protocol):
    """The prior of the latents of E episodes."""

    def log_prob(self, z_EPD: Tensor) -> Tensor:
        """log p(z) of P points of each episode, in nats: (E, P, D) -> (E, P)."""


class ElboTerms(NamedTuple):
    """The terms of Eq. 3 for each data point, averaged over its samples, in nats: (B, M) each."""

    reconstruction: Tensor
    """1/R sum_r log p(x | z^(r))."""
    prior: Tensor
    """1/N sum_n log p_psi*(z^(n))."""
    entropy: Tensor
    """-1/N sum_n log q(z^(n) | x, D)."""

    @property
    def elbo(self) -> Tensor:
        """Lower bound of each data point, (B, M)."""
        return self.reconstruction + self.prior + self.entropy


def standard_normal(z_EPD: Tensor) -> Mixture:
    """N(0, I) for each episode, as a mixture of one component: the prior of a VAE (Kingma and Welling, 2014)."""
    return Mixture(z_EPD.new_zeros(len(z_EPD), 1, z_EPD.shape[2]), z_EPD.new_zeros(len(z_EPD), 1))


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x | z) = sum of x log p + (1 - x) log(1 - p) over pixels, p = sigmoid(logits): (n, ...) twice -> (n,)."""
    loss = F.binary_cross_entropy_with_logits(at_least_float32(logits), x, reduction="none")
    return -loss.flatten(1).sum(dim=1)


def calibrated_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """log N(x; mean, s^2 I) with the optimal variance of each episode: (B, P, F) twice -> (B, P).

    s^2 is the mean squared error over the points and dimensions of an episode, the maximum-likelihood value ("optimal
    sigma", Rybkin et al. 2020), and carries gradient as in that paper. It is per episode and not per batch, so that an
    episode does not depend on the others and ranks need no communication.
    """
    error = (x - at_least_float32(mean)).square()
    variance = error.mean(dim=(1, 2), keepdim=True).clamp_min(CALIBRATION_FLOOR)
    return -0.5 * (error / variance + variance.log() + math.log(2 * math.pi)).sum(dim=2)


def fixed_variance_log_prob(x: Tensor, mean: Tensor, variance: float) -> Tensor:
    """log N(x; mean, s^2 I) without its constant, -|x - mean|^2 / (2 s^2): (B, P, F) twice -> (B, P).

    s^2 = 1/2 gives the reconstruction term of the published code for Mini-ImageNet, the whole squared error.
    """
    return -0.5 / variance * (x - at_least_float32(mean)).square().sum(dim=2)


def gaussian_log_prob(noise: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mu, sigma^2) at z = mu + sigma * noise, (..., D) -> (...); a function of the noise and sigma alone."""
    return -0.5 * (noise.square() + log_variance + math.log(2 * math.pi)).sum(dim=-1)


def lower_bound(
    x: Tensor,
    decoded: Tensor,
    z_BMND: Tensor,
    noise_BMND: Tensor,
    log_variance_BMD: Tensor,
    prior: Prior,
    likelihood: Likelihood = "bernoulli",
) -> ElboTerms:
    """The lower bound of Eq. 3 for every data point of every episode.

    EM and both densities use all N samples. Only the first R are decoded, where the paper decodes all: the samples of a
    data point are exchangeable (psi* is a symmetric function of them), so the expectation does not depend on R. This
    holds exactly where samples are decoded independently of each other; batch normalisation in the decoder of images
    (over B*M*R maps, in training mode) and the calibrated variance (over the P points of an episode) couple them.

    Args:
        x: images in [0, 1], (B*M, C, H, W), or features, (B*M, F).
        decoded: decoder outputs, (B*M*R, ...), samples of a data point adjacent: pixel logits or feature means.
        z_BMND: Monte Carlo samples.
        noise_BMND: the standard normal noise that gave them.
        log_variance_BMD: log variance of q(z | x, D).
        prior: psi*, without gradient.
        likelihood: of x given z.
    """
    B, M, _, _ = z_BMND.shape
    R = decoded.shape[0] // (B * M)
    target = x if R == 1 else x.repeat_interleave(R, dim=0)
    if likelihood == "bernoulli":
        log_likelihood = bernoulli_log_prob(target, decoded)
    else:
        target_BPF, mean_BPF = target.unflatten(0, (B, -1)), decoded.unflatten(0, (B, -1))
        if likelihood == "calibrated":
            log_likelihood = calibrated_log_prob(target_BPF, mean_BPF)
        else:
            log_likelihood = fixed_variance_log_prob(target_BPF, mean_BPF, FIXED_VARIANCES[likelihood])
    reconstruction = log_likelihood.view(B, M, R).mean(dim=2)
    log_prior = prior.log_prob(z_BMND.flatten(1, 2)).view(z_BMND.shape[:3]).mean(dim=2)
    log_q = gaussian_log_prob(noise_BMND, log_variance_BMD.unsqueeze(2)).mean(dim=2)
    return ElboTerms(reconstruction, log_prior, -log_q)


def objective(terms: ElboTerms, scale: str, beta: float = 1.0) -> Tensor:
    """Eq. 9, to be maximised: the mean over episodes of the sum over data points.

    `scale` "mean" is the mean over data points, as in the published code. `beta` is the weight of the KL divergence
    from the prior, -(prior + entropy) (Higgins et al., ICLR 2017); 1: Eq. 9.
    """
    per_point = terms.reconstruction + beta * (terms.prior + terms.entropy)
    return (per_point.sum(dim=1) if scale == "sum" else per_point.mean(dim=1)).mean()
