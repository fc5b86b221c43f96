"""Semi-supervised EM on the latents of few-shot episodes, and the class probabilities of their queries.

The posterior draws N latents of each image (Eq. 5), and EM fits one Gaussian per class to them (Eq. 10), with weights
fixed at 1/K,

    E-step: Q_qn(k) = N(z_q^(n); mu_k, s2_k) / sum_j N(z_q^(n); mu_j, s2_j)
    M-step: mu_k and s2_k are the mean and variance of the support latents of class k and of all query latents,
            the latter weighted by Q_qn(k)

and the prediction averages Bayes' rule over the latents of a query (Eq. 11):

    p(y = k | x_q, D) = 1/N sum_n N(z_q^(n); mu_k, s2_k) / sum_j N(z_q^(n); mu_j, s2_j)

A departure from the paper is at choice: `AdaptSettings.proportions` estimates the class weights instead of fixing them
to 1/K, for unbalanced queries, or gives every class the same number of queries, if they are known to be balanced. The
published code differs from Eq. 10: it uses the identity instead of s2 in all
E-steps, and s2 in the final posterior only. `AdaptSettings` selects either: `e_step` for Eq. 10, `final_covariance` for
Eq. 11.

Notation: E episodes, K ways, P queries of an episode, T labelled points per class (images times samples), N Monte Carlo
samples, D latent size. Equations are those of Lee et al., ICLR 2021.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metagmvae.configs.schema import AdaptSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.objectives.balanced_classes import balancing_weights
from metagmvae.training.objectives.mixture import ClassMixture, class_logits, fit_semi_supervised, with_background

SMALL = 1e-30
"""Probabilities below this are known by their logarithm only, see `fit_log_posteriors`."""


def classify_latents(
    adapt: AdaptSettings,
    z_ETND: Tensor,
    label_T: Tensor,
    z_EPND: Tensor,
    *,
    fit_on_queries: bool,
    background: float | None = None,
) -> Tensor:
    """Return the log-probabilities of `fit_log_posteriors` for a support whose classes may have different shots.

    Args:
        adapt: settings of EM.
        z_ETND: latents of the T labelled images.
        label_T: their classes, int64, 0 to K - 1, the same in all episodes; each class occurs.
        z_EPND: latents of the queries.
        fit_on_queries: as in `fit_log_posteriors`.
        background: as in `fit_log_posteriors`.
    """
    rows_KS, is_real_KS = rows_by_class(label_T)
    E, _, N, _ = z_ETND.shape
    support_EKTD = z_ETND[:, rows_KS.to(z_ETND.device)].flatten(2, 3)
    mask_EKT = None
    if not is_real_KS.all():
        mask_EKT = is_real_KS.repeat_interleave(N, dim=1).to(z_ETND).expand(E, -1, -1)
    _, log_p_EPK = fit_log_posteriors(
        adapt, support_EKTD, z_EPND, fit_on_queries=fit_on_queries, mask_EKT=mask_EKT, background=background
    )
    return log_p_EPK


def rows_by_class(label_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of each class in the support, (K, S) for S the largest number of shots, and which are real.

    Classes with fewer shots are padded; the second tensor is False there.
    """
    shots_K = torch.bincount(label_T)
    by_class = torch.argsort(label_T, stable=True).split(shots_K.tolist())
    rows_KS = pad_sequence(list(by_class), batch_first=True)
    return rows_KS, torch.arange(rows_KS.shape[1]) < shots_K[:, None]


def fit_log_posteriors(
    adapt: AdaptSettings,
    support_EKTD: Tensor,
    query_EPND: Tensor,
    *,
    fit_on_queries: bool = True,
    mask_EKT: Tensor | None = None,
    background: float | None = None,
) -> tuple[ClassMixture, Tensor]:
    """Fit one Gaussian per class by semi-supervised EM (Eq. 10) and classify the queries by it (Eq. 11).

    Args:
        adapt: settings of EM.
        support_EKTD: latents of the labelled images, by class.
        query_EPND: latents of the queries.
        fit_on_queries: False fits the Gaussians to the support alone (inductive).
        mask_EKT: 1 for a labelled point, 0 for padding, where shots differ between classes. None: no padding.
        background: level of a component for queries of no labelled class, as in `fit_semi_supervised`; its probability
            is the last column. None: no such component.

    Returns:
        The Gaussians, and the log-probabilities in float64, (E, P, K), or (E, P, K + 1) with a background component.

    Raises:
        DataError: a probability is not a number.
    """
    E, P, N, _ = query_EPND.shape
    points_EPD = query_EPND.flatten(1, 2)
    reweight = partial(balancing_weights, background) if adapt.proportions == "balanced" and fit_on_queries else None
    mixture = fit_semi_supervised(
        support_EKTD,
        points_EPD if fit_on_queries else points_EPD[:, :0],
        iterations=adapt.iterations,
        e_step=adapt.e_step,
        temperature=adapt.temperature,
        mask_EKT=mask_EKT,
        prior_count=adapt.proportions_prior * N if adapt.proportions == "estimated" else None,
        background=background,
        reweight=reweight,
    )
    logits_EKP = class_logits(mixture, points_EPD, adapt.final_covariance, adapt.temperature).mT
    if reweight is not None:
        logits_EKP = logits_EKP + reweight(logits_EKP.mT)[..., None]
    # The points are the last axis here too: half the time on a CPU.
    log_posterior = torch.log_softmax(with_background(logits_EKP, background, dim=1), dim=1).view(E, -1, P, N)
    mean_EPK = log_posterior.exp().mean(dim=3).mT
    if not torch.isfinite(mean_EPK).all():
        # The argmax of NaN is the first class, which would pass for a prediction and count as chance.
        raise DataError(
            f"the model gives NaN instead of probabilities: its weights or adapt.temperature ({adapt.temperature:g}) "
            "are wrong; use another checkpoint"
        )
    # The logarithm keeps the differences of probabilities that are too small for their type. That of a larger one comes
    # from the mean itself, so that no rounding changes which class is the most probable.
    small_EPK = torch.logsumexp(log_posterior, dim=3).mT.double() - math.log(N)
    log_p_EPK = torch.where(mean_EPK > SMALL, mean_EPK.double().clamp_min(SMALL).log(), small_EPK)
    return mixture, log_p_EPK.contiguous()
