"""Gaussian mixtures fitted to episodes: EM (Eq. 7) and semi-supervised EM (Eq. 10, 11) of Lee et al., ICLR 2021.

Batched functions in log space, float32 or float64, used by the training objective and at meta-test. A squared distance
|z - mu|^2 is never formed as a (P, K, D) tensor: it is expanded into matrix products. The points are first shifted to
their common mean, which keeps the expansion accurate however far from zero they are.

Notation: E episodes fitted side by side, P points per episode (data points times Monte Carlo samples), K components or
classes, D latent size, T labelled points per class, C = 2D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Covariance = Literal["diagonal", "identity"]
Reweight = Callable[[Tensor, Tensor | None], Tensor]

MIN_COUNT = 1e-6
"""Sum of responsibilities (in points) below which a component is empty: it keeps its mean and a vanishing weight."""
VARIANCE_FLOOR = 1e-6
"""Smallest variance of a class: coinciding points would otherwise give log 0. The paper has no floor."""


class Mixture(NamedTuple):
    """psi of Eq. 7: means and log weights of K components with identity covariance."""

    mean_EKD: Tensor
    log_weight_EK: Tensor

    def log_prob(self, z_EPD: Tensor) -> Tensor:
        """log p_psi(z) = log sum_k pi_k N(z; mu_k, I), in nats: (E, P, D) -> (E, P)."""
        centre_E1D = self.mean_EKD.mean(dim=1, keepdim=True)
        z_EPD = z_EPD - centre_E1D
        logits_EPK = _joint_logits(z_EPD, self.mean_EKD - centre_E1D, self.log_weight_EK)
        base_EP = -0.5 * (z_EPD.square().sum(dim=2) + z_EPD.shape[2] * math.log(2 * math.pi))
        return base_EP + torch.logsumexp(logits_EPK, dim=2)


class ClassMixture(NamedTuple):
    """psi of Eq. 10: means and diagonal covariances of K classes, and their weights."""

    mean_EKD: Tensor
    variance_EKD: Tensor
    log_weight_EK: Tensor | None = None
    """Log proportions of the classes among the queries; None: equal, as in Eq. 10."""


@torch.no_grad()
def fit_mixture(z_EPD: Tensor, init_EK: Tensor, iterations: int) -> Mixture:
    """Fit psi* of Eq. 7 by EM: identity covariance, initial weights 1/K, initial means at the given points.

    psi* is a constant of the objective: no gradient flows through it.

    Args:
        z_EPD: points.
        init_EK: indices of the points where the means start, from `init_indices`.
        iterations: number of E- and M-steps.
    """
    centre_E1D = z_EPD.mean(dim=1, keepdim=True)
    z_EPD = z_EPD - centre_E1D
    episodes, components = init_EK.shape
    mean_EKD = torch.gather(z_EPD, 1, init_EK[..., None].expand(-1, -1, z_EPD.shape[2]))
    log_weight_EK = z_EPD.new_full((episodes, components), -math.log(components))
    for _ in range(iterations):
        resp_EPK = torch.softmax(_joint_logits(z_EPD, mean_EKD, log_weight_EK), dim=2)
        count_EK = resp_EPK.sum(dim=1)
        new_mean_EKD = _sum_over_points(resp_EPK, z_EPD) / count_EK[..., None]
        mean_EKD = torch.where((count_EK > MIN_COUNT)[..., None], new_mean_EKD, mean_EKD)
        log_weight_EK = _log_weights(count_EK)
    return Mixture(mean_EKD + centre_E1D, log_weight_EK)


def _sum_over_points(resp_EPK: Tensor, z_EPD: Tensor) -> Tensor:
    """sum_p r_pk z_p: (E, P, K), (E, P, D) -> (E, K, D).

    On a GPU the sum has two stages. One matrix product with few rows and a long inner dimension would use a few of its
    processors only.
    """
    blocks = math.gcd(z_EPD.shape[1], 64) if z_EPD.is_cuda else 1
    resp_EbpK, z_EbpD = resp_EPK.unflatten(1, (blocks, -1)), z_EPD.unflatten(1, (blocks, -1))
    return (resp_EbpK.transpose(2, 3) @ z_EbpD).sum(dim=1)


def _joint_logits(z_EPD: Tensor, mean_EKD: Tensor, log_weight_EK: Tensor) -> Tensor:
    """log pi_k N(z; mu_k, I) without its terms in z alone, which cancel in the posterior over k: -> (E, P, K)."""
    constant_EK = log_weight_EK - 0.5 * mean_EKD.square().sum(dim=2)
    return torch.baddbmm(constant_EK[:, None, :], z_EPD, mean_EKD.transpose(1, 2))


@torch.no_grad()
def fit_semi_supervised(
    support_EKTD: Tensor,
    query_EPD: Tensor,
    *,
    iterations: int,
    e_step: Covariance = "diagonal",
    temperature: float = 1.0,
    mask_EKT: Tensor | None = None,
    prior_count: float | None = None,
    background: float | None = None,
    reweight: Reweight | None = None,
) -> ClassMixture:
    """Fit psi* of Eq. 10 by EM: responsibilities of labelled points are fixed to their class, weights to 1/K.

    Means start at the class means of the support, covariances at the identity. Extensions of Eq. 10, off by default:
    - Weights pi_k are estimated under a Dirichlet prior, pi ~ Dir(1 + prior_count, ...): the M-step is its mode,
      pi_k = (n_k + prior_count) / sum_j (n_j + prior_count), n_k the sum of the responsibilities of the unlabelled
      points. The labelled points have no part in it: their numbers are chosen by whoever labelled them.
    - A background component of constant density takes unlabelled points that are far from every class (the uniform
      noise component of Banfield and Raftery 1993), so that they do not move the means of the classes.

    Args:
        support_EKTD: labelled points of each class.
        query_EPD: unlabelled points; without any (P = 0) the result is each class's mean and variance.
        iterations: number of E- and M-steps.
        e_step: covariance in the E-steps: `diagonal`, sigma_k^2 (Eq. 10), or `identity` (published code).
        temperature: divides the log-likelihoods in every E-step (deterministic annealing EM, Ueda and Nakano 1998); 1:
            Eq. 10.
        mask_EKT: 1 for a labelled point, 0 for padding (finite values) where classes have fewer than T points; at least
            one point per class. None: no padding.
        prior_count: unlabelled points per class that the prior of the weights is worth, at least 0; None: weights 1/K.
        background: log density of the background component after division by the temperature, relative to classes of
            equal weights without the constant (2 pi)^(-D/2) of their densities; None: no such component.
        reweight: returns log weights to add in the E-step, from the logits and the weights of the E-step before.
    """
    if iterations < 1:
        raise ValueError(f"iterations ({iterations}) must be at least 1")
    labelled_EK1 = support_EKTD.new_full((*support_EKTD.shape[:2], 1), support_EKTD.shape[2])
    if mask_EKT is not None:
        labelled_EK1 = mask_EKT.sum(dim=2)[..., None]
        support_EKTD = support_EKTD * mask_EKT[..., None]
    # Common mean of all points, without the padding.
    total_E1D = (support_EKTD.sum(dim=(1, 2)) + query_EPD.sum(dim=1))[:, None]
    centre_E1D = total_E1D / (labelled_EK1.sum(dim=1, keepdim=True) + query_EPD.shape[1])
    support_EKTD, query_EPD = support_EKTD - centre_E1D[:, None], query_EPD - centre_E1D
    if mask_EKT is not None:
        support_EKTD = support_EKTD * mask_EKT[..., None]
    support_sum_EKD, support_square_EKD = support_EKTD.sum(dim=2), support_EKTD.square().sum(dim=2)
    square_EPD = query_EPD.square()
    # Equal for all classes, so that it cancels in the softmax, but for a background component.
    norm_E1P = None if background is None else square_EPD.sum(dim=2)[:, None]
    mean_EKD = support_sum_EKD / labelled_EK1
    variance_EKD = torch.ones_like(mean_EKD)
    log_weight_EK = offset_EK = None
    for remaining in reversed(range(iterations if query_EPD.shape[1] else 1)):  # the support alone stays as it is
        if e_step == "diagonal":
            logits_EKP = _diagonal_logits(query_EPD, square_EPD, mean_EKD, variance_EKD, temperature)
        else:
            logits_EKP = _identity_logits(query_EPD, norm_E1P, mean_EKD, temperature)
        logits_EKP = _weighted(logits_EKP, log_weight_EK)
        if reweight is not None:
            offset_EK = reweight(logits_EKP.transpose(1, 2), offset_EK)
            logits_EKP = logits_EKP + offset_EK[..., None]
        resp_EKP = torch.softmax(with_background(logits_EKP, background, dim=1), dim=1)[:, : mean_EKD.shape[1]]
        if prior_count is not None and query_EPD.shape[1]:
            log_weight_EK = _log_weights(resp_EKP.sum(dim=2), prior_count)
        count_EK1 = labelled_EK1 + resp_EKP.sum(dim=2, keepdim=True)
        mean_EKD = (support_sum_EKD + resp_EKP @ query_EPD) / count_EK1
        if e_step == "diagonal" or not remaining:
            square_EKD = (support_square_EKD + resp_EKP @ square_EPD) / count_EK1
            variance_EKD = (square_EKD - mean_EKD.square()).clamp_min(VARIANCE_FLOOR)
    return ClassMixture(mean_EKD + centre_E1D, variance_EKD, log_weight_EK)


def class_log_posterior(
    mixture: ClassMixture, z_EPD: Tensor, covariance: Covariance = "diagonal", temperature: float = 1.0
) -> Tensor:
    """log p(y = k | z) by Bayes' rule with the weights of the mixture, the summand of Eq. 11, (E, P, K)."""
    return torch.log_softmax(class_logits(mixture, z_EPD, covariance, temperature), dim=2)


def class_logits(
    mixture: ClassMixture, z_EPD: Tensor, covariance: Covariance = "diagonal", temperature: float = 1.0
) -> Tensor:
    """log (K pi_k) + log N(z; mu_k, s2_k) / temperature, without the constant (2 pi)^(-D/2) of the density.

    Args:
        mixture: psi* of Eq. 10.
        z_EPD: points.
        covariance: `diagonal`, sigma_k^2 of the mixture (Eq. 11), or `identity`.
        temperature: divides the log-likelihoods; 1: Eq. 11.

    Returns:
        (E, P, K).
    """
    centre_E1D = mixture.mean_EKD.mean(dim=1, keepdim=True)
    z_EPD, mean_EKD = z_EPD - centre_E1D, mixture.mean_EKD - centre_E1D
    square_EPD = z_EPD.square()
    if covariance == "diagonal":
        logits_EKP = _diagonal_logits(z_EPD, square_EPD, mean_EKD, mixture.variance_EKD, temperature)
    else:
        logits_EKP = _identity_logits(z_EPD, square_EPD.sum(dim=2)[:, None], mean_EKD, temperature)
    return _weighted(logits_EKP, mixture.log_weight_EK).transpose(1, 2)


def with_background(logits: Tensor, background: float | None, dim: int = 2) -> Tensor:
    """Append the logit of the background component of `fit_semi_supervised`, if there is one, to the classes, `dim`."""
    pad = (0, 0) * (logits.ndim - 1 - dim) + (0, 1)
    return logits if background is None else torch.nn.functional.pad(logits, pad, value=background)


def _weighted(logits_EKP: Tensor, log_weight_EK: Tensor | None) -> Tensor:
    """Add log (K pi_k); weights of 1/K leave the logits as they are."""
    if log_weight_EK is None:
        return logits_EKP
    return logits_EKP + (log_weight_EK + math.log(log_weight_EK.shape[1]))[..., None]


def _log_weights(count_EK: Tensor, prior_count: float = 0.0) -> Tensor:
    """Log of the mode of the Dirichlet posterior of the weights; the floor keeps the log of an empty one finite."""
    weight_EK = (count_EK + prior_count).clamp_min(MIN_COUNT)
    return torch.log(weight_EK / weight_EK.sum(dim=1, keepdim=True))


def _diagonal_logits(
    z_EPD: Tensor, square_EPD: Tensor, mean_EKD: Tensor, variance_EKD: Tensor, temperature: float
) -> Tensor:
    """log N(z; mu_k, sigma_k^2) / temperature without its constant, (E, K, P); `square_EPD` holds z^2.

    The parameters of the classes are divided by the temperature: K values instead of P. With the points as the last
    axis, the softmax over the classes takes half the time on a CPU.
    """
    precision_EKD = variance_EKD.reciprocal()
    constant_EK1 = -0.5 * (mean_EKD.square() * precision_EKD + variance_EKD.log()).sum(dim=2, keepdim=True)
    linear_EKP = torch.baddbmm(constant_EK1 / temperature, mean_EKD * precision_EKD / temperature, z_EPD.mT)
    return torch.baddbmm(linear_EKP, precision_EKD / (-2 * temperature), square_EPD.mT)


def _identity_logits(z_EPD: Tensor, norm_E1P: Tensor | None, mean_EKD: Tensor, temperature: float) -> Tensor:
    """`_diagonal_logits` for variances of 1, half the work; `norm_E1P` holds |z|^2, None leaves this term out."""
    norm_EK1 = mean_EKD.square().sum(dim=2, keepdim=True)
    norm_EKP = norm_EK1 if norm_E1P is None else norm_EK1 + norm_E1P
    return torch.baddbmm(norm_EKP / (-2 * temperature), mean_EKD / temperature, z_EPD.mT)
