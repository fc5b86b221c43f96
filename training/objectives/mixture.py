"""Mixtures of Gaussians fitted to episodes: EM (Eq. 7) and semi-supervised EM (Eq. 10, 11).

Plain batched functions, used by the objective and by adaptation alike. Lee et al., ICLR 2021.

Notation: E episodes (fitted side by side), P points (data points times Monte Carlo samples), K components,
D latent size, T labelled points per class. Everything is float32 or float64 and in log space. A distance
|z - mu|^2 is never formed as a (P, K, D) tensor: it is expanded into matrix products, on points that are
shifted to their common mean first, so that the expansion stays accurate however far the points lie out. (Its
error is then the rounding of the squared distance between groups: 1e-2 nats in float32 for groups 100 apart.)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Covariance = Literal["diagonal", "identity"]

EMPTY = 1e-6
"""Responsibility (in points) below which a component is empty: it keeps its mean and a vanishing weight."""

VARIANCE_FLOOR = 1e-6
"""Smallest variance of a class: points that coincide would otherwise give log 0."""


class Mixture(NamedTuple):
    """psi of Eq. 7: identity covariances, free means and weights."""

    mean_EKD: Tensor
    log_weight_EK: Tensor


class ClassMixture(NamedTuple):
    """psi of Eq. 10: one component per class, diagonal covariances, equal weights."""

    mean_EKD: Tensor
    variance_EKD: Tensor


class MixtureError(ValueError):
    """More components were asked for than there are distinct points."""


def init_indices(z_EPD: Tensor, components: int, generators: list[torch.Generator]) -> Tensor:
    """Draw K random rows of distinct value in each episode; Eq. 7 starts its means there.

    Rows that coincide would stay one component for ever, so a draw that holds equal rows is repeated among
    the distinct ones.

    Args:
        z_EPD: points, (E, P, D).
        components: K.
        generators: one per episode, so that the draw does not depend on what else is in the batch.

    Returns:
        (E, K) int64 row numbers.

    Raises:
        MixtureError: an episode has fewer than K distinct points.
    """
    points = z_EPD.shape[1]
    rows = []
    for z_PD, generator in zip(z_EPD, generators, strict=True):
        order = torch.randperm(points, generator=generator, device=generator.device)
        drawn = order[:components].to(z_PD.device)
        if len(torch.unique(z_PD[drawn], dim=0)) < components:
            drawn = _distinct_rows(z_PD, components, generator)
        rows.append(drawn)
    return torch.stack(rows)


def _distinct_rows(z_PD: Tensor, components: int, generator: torch.Generator) -> Tensor:
    values, group = torch.unique(z_PD, dim=0, return_inverse=True)
    if len(values) < components:
        raise MixtureError(
            f"{components} components need as many distinct points, and the episode has {len(values)}: "
            "lower train.components or raise train.set_size"
        )
    order = torch.randperm(len(z_PD), generator=generator, device=generator.device).to(z_PD.device)
    # The first row of each value in a random order: scatter backwards so that the earliest one stays.
    first = torch.empty(len(values), dtype=torch.long, device=z_PD.device)
    first[group[order.flip(0)]] = order.flip(0)
    chosen = torch.randperm(len(values), generator=generator, device=generator.device)[:components]
    return first[chosen.to(z_PD.device)]


@torch.no_grad()
def fit_mixture(z_EPD: Tensor, init_EK: Tensor, iterations: int) -> Mixture:
    """Fit psi* of Eq. 7 by EM: identity covariance, means from the given rows, weights from 1/K.

    psi* is a constant of the objective (no gradient flows into it).

    Args:
        z_EPD: points, (E, P, D), floating point.
        init_EK: rows where the K means start, (E, K).
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
        fresh_EKD = (resp_EPK.transpose(1, 2) @ z_EPD) / count_EK.clamp_min(EMPTY)[..., None]
        mean_EKD = torch.where((count_EK > EMPTY)[..., None], fresh_EKD, mean_EKD)
        weight_EK = count_EK.clamp_min(EMPTY)
        log_weight_EK = torch.log(weight_EK / weight_EK.sum(dim=1, keepdim=True))
    return Mixture(mean_EKD + centre_E1D, log_weight_EK)


def mixture_log_prob(mixture: Mixture, z_EPD: Tensor) -> Tensor:
    """log p_psi(z) = log sum_k pi_k N(z; mu_k, I), in nats: (E, P, D) -> (E, P)."""
    centre_E1D = mixture.mean_EKD.mean(dim=1, keepdim=True)
    z_EPD = z_EPD - centre_E1D
    logits_EPK = _joint_logits(z_EPD, mixture.mean_EKD - centre_E1D, mixture.log_weight_EK)
    base_EP = -0.5 * (z_EPD.square().sum(dim=2) + z_EPD.shape[2] * math.log(2 * math.pi))
    return base_EP + torch.logsumexp(logits_EPK, dim=2)


def _joint_logits(z_EPD: Tensor, mean_EKD: Tensor, log_weight_EK: Tensor) -> Tensor:
    """log pi_k N(z; mu_k, I) up to the term of z alone, which no posterior over k depends on."""
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
) -> ClassMixture:
    """Fit psi* of Eq. 10: labelled points stay with their class, unlabelled ones are shared out by EM.

    Means start at the support's class means, covariances at the identity, weights stay 1/K.

    Args:
        support_EKTD: labelled points by class, (E, K, T, D).
        query_EPD: unlabelled points, (E, P, D); P may be 0 (then this is each class's mean and variance).
        iterations: number of E- and M-steps.
        e_step: `diagonal` uses sigma_k^2 in every E-step (Eq. 10), `identity` in none (published code).
        temperature: log-likelihoods are divided by it in every E-step (Ueda and Nakano 1998, "deterministic annealing
            EM"); 1: Eq. 10.
        mask_EKT: 1 for a labelled point, 0 for padding, where classes have unequal numbers of them; at least one
            in each class. None: all are points.
    """
    if iterations < 1:
        raise ValueError(f"iterations ({iterations}) must be at least 1")
    mask_EKT1 = (support_EKTD.new_ones(support_EKTD.shape[:3]) if mask_EKT is None else mask_EKT)[..., None]
    # Any centre will do (see above); padding is kept out of it, so that it may hold anything finite.
    all_EPD = torch.cat([(support_EKTD * mask_EKT1).flatten(1, 2), query_EPD], dim=1)
    count_E11 = mask_EKT1.sum(dim=(1, 2))[:, None] + query_EPD.shape[1]
    centre_E1D = all_EPD.sum(dim=1, keepdim=True) / count_E11
    moments_EPC = _with_squares(query_EPD - centre_E1D)
    labelled_EKC = (_with_squares(support_EKTD - centre_E1D[:, None]) * mask_EKT1).sum(dim=2)
    labelled = mask_EKT1.sum(dim=2)
    size = support_EKTD.shape[3]
    mean_EKD = labelled_EKC[..., :size] / labelled
    variance_EKD = torch.ones_like(mean_EKD)
    for _ in range(iterations):
        used_EKD = variance_EKD if e_step == "diagonal" else torch.ones_like(variance_EKD)
        resp_EPK = torch.softmax(_class_logits(moments_EPC, mean_EKD, used_EKD, temperature), dim=2)
        total_EKC = labelled_EKC + resp_EPK.transpose(1, 2) @ moments_EPC
        count_EK1 = labelled + resp_EPK.sum(dim=1)[..., None]
        mean_EKD = total_EKC[..., :size] / count_EK1
        variance_EKD = (total_EKC[..., size:] / count_EK1 - mean_EKD.square()).clamp_min(VARIANCE_FLOOR)
    return ClassMixture(mean_EKD + centre_E1D, variance_EKD)


def class_log_posterior(
    mixture: ClassMixture, z_EPD: Tensor, covariance: Covariance = "diagonal", temperature: float = 1.0
) -> Tensor:
    """log p(y = k | z) under equal weights by Bayes' rule, the summand of Eq. 11: (E, P, D) -> (E, P, K).

    Log-likelihoods are divided by `temperature` first, as in `fit_semi_supervised`.
    """
    centre_E1D = mixture.mean_EKD.mean(dim=1, keepdim=True)
    variance_EKD = mixture.variance_EKD if covariance == "diagonal" else torch.ones_like(mixture.variance_EKD)
    moments_EPC = _with_squares(z_EPD - centre_E1D)
    logits = _class_logits(moments_EPC, mixture.mean_EKD - centre_E1D, variance_EKD, temperature)
    return torch.log_softmax(logits, dim=2)


def _with_squares(z: Tensor) -> Tensor:
    """(..., D) -> (..., 2D): z beside z^2, so that a step of EM is one product each way."""
    return torch.cat([z, z.square()], dim=-1)


def _class_logits(moments_EPC: Tensor, mean_EKD: Tensor, variance_EKD: Tensor, temperature: float) -> Tensor:
    """log N(z; mu_k, sigma_k^2) / temperature up to a constant: (E, P, 2D), (E, K, D) -> (E, P, K).

    It divides what there is of each class, not of each point.
    """
    precision_EKD = variance_EKD.reciprocal()
    weights_EKC = torch.cat([mean_EKD * precision_EKD, -0.5 * precision_EKD], dim=2)
    constant_EK = -0.5 * (mean_EKD.square() * precision_EKD + variance_EKD.log()).sum(dim=2)
    return torch.baddbmm(constant_EK[:, None, :] / temperature, moments_EPC, weights_EKC.transpose(1, 2) / temperature)
