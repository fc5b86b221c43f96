"""Class probabilities of the queries of few-shot episodes with equal shots, many episodes at a time.

An episode is the set D = support + queries. The posterior draws N latents of each image (Eq. 5),

    z^(n) ~ q(z | x, D),    n = 1 .. N,

semi-supervised EM fits one Gaussian per class to them (Eq. 10), with weights fixed at 1/K,

    E-step: Q_qn(k) = N(z_q^(n); mu_k, s2_k) / sum_j N(z_q^(n); mu_j, s2_j)
    M-step: mu_k and s2_k are the mean and variance of the support latents of class k and of all query latents,
            the latter weighted by Q_qn(k)

and the prediction averages Bayes' rule over the latents of a query (Eq. 11):

    p(y = k | x_q, D) = 1/N sum_n N(z_q^(n); mu_k, s2_k) / sum_j N(z_q^(n); mu_j, s2_j)

Two departures from the paper are at choice. `AdaptSettings.proportions` estimates the class weights instead of fixing
them to 1/K, for unbalanced queries. A temperature T of the posterior calibrates the probabilities: p(k)^(1/T), divided
by the sum over k (`calibrated`). It is another temperature than `AdaptSettings.temperature`, which acts inside EM.

The published code differs from Eq. 10: it uses the identity instead of s2 in all E-steps, and s2 in the final
posterior only. `AdaptSettings` selects either: `e_step` for Eq. 10, `final_covariance` for Eq. 11.

Notation: E episodes, K ways, S shots, P queries of an episode, T labelled points per class (images times samples),
N Monte Carlo samples, F features, D latent size. Equations are those of Lee et al., ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.meta_gmvae import MetaGMVAE, sample_latents
from metagmvae.training.objectives.mixture import ClassMixture, class_logits, fit_semi_supervised, with_background

PredictionMode = Literal["transductive", "inductive"]
"""Whether the queries of an episode are classified together or one at a time; see `predict_episodes`."""

MAX_LATENT_VALUES = {"cpu": 2**23, "cuda": 2**26}
"""Maximum number of latent values (points x samples x D) in a batch, by device type; about four such arrays exist.
On a CPU small batches are the fast ones, because they fit its caches (a quarter faster than 2^25, measured)."""

SMALL = 1e-30
"""Probabilities below this are known by their logarithm only, see `fit_log_posteriors`."""


@torch.inference_mode()
def predict_episodes(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_support_EKSF: Tensor,
    h_query_EPF: Tensor,
    *,
    mode: PredictionMode = "transductive",
    seed_by_episode: Sequence[int],
) -> Tensor:
    """Return p(y | x, D) of every query (Eq. 10 and 11), (E, P, K). Arguments and errors are those of `log_posteriors`.

    These are the probabilities of the model itself, at posterior temperature 1.
    """
    log_p_EPK = log_posteriors(model, adapt, h_support_EKSF, h_query_EPF, mode=mode, seed_by_episode=seed_by_episode)
    return log_p_EPK.exp().to(h_query_EPF.dtype)


@torch.inference_mode()
def log_posteriors(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_support_EKSF: Tensor,
    h_query_EPF: Tensor,
    *,
    mode: PredictionMode = "transductive",
    seed_by_episode: Sequence[int],
    background: float | None = None,
) -> Tensor:
    """Return log p(y | x, D) of every query (Eq. 10 and 11) in float64, (E, P, K).

    Args:
        model: on the device of the features.
        adapt: settings of EM.
        h_support_EKSF: features by `encode_images`.
        h_query_EPF: features by `encode_images`.
        mode: `transductive`, the protocol of the paper: the attention and EM see the support and all queries of an
            episode. `inductive`: each query is classified alone, in a set of the support and this query; the class
            means and variances come from the support latents only. The probabilities of a query depend neither on
            other queries, nor on its position among them, nor on the order of the classes and of the support images.
        seed_by_episode: seeds of the Monte Carlo noise, so that results do not depend on the batching.
        background: level of a component for queries of no labelled class, as in `fit_semi_supervised`; its probability
            is the last column, (E, P, K + 1). None: no such component.

    Raises:
        DataError: a probability is not a number.
    """
    model.eval()
    if mode == "inductive":
        episodes = zip(h_support_EKSF, h_query_EPF, seed_by_episode, strict=True)
        return torch.stack([_classify_alone(model, adapt, *episode, background) for episode in episodes])
    _, K, S, _ = h_support_EKSF.shape
    P = h_query_EPF.shape[1]
    noise = torch.stack([latent_noise(model, adapt, K * S + P, seed, h_query_EPF.device) for seed in seed_by_episode])
    h_EMF = torch.cat([h_support_EKSF.flatten(1, 2), h_query_EPF], dim=1)
    return _classify_sets(model, adapt, h_EMF, noise, (K, S), background, fit_on_queries=True)


def _classify_alone(
    model: MetaGMVAE, adapt: AdaptSettings, h_KSF: Tensor, h_PF: Tensor, seed: int, background: float | None
) -> Tensor:
    """Classify each query separately, in a set of the support and this query; several sets at a time: (P, K)."""
    K, S, _ = h_KSF.shape
    noise_MND = inductive_noise(model, adapt, K * S, seed, h_PF.device)
    values_per_set = (K * S + 1) * adapt.samples * model.latent
    sets_per_batch = max(1, MAX_LATENT_VALUES[h_PF.device.type] // (4 * values_per_set))
    log_p = []
    for first in range(0, len(h_PF), sets_per_batch):
        query = h_PF[first : first + sets_per_batch, None]
        h_EMF = torch.cat([h_KSF.flatten(0, 1).expand(len(query), -1, -1), query], dim=1)
        noise_EMND = noise_MND.expand(len(query), -1, -1, -1)
        answer_EPK = _classify_sets(model, adapt, h_EMF, noise_EMND, (K, S), background, fit_on_queries=False)
        log_p.append(answer_EPK[:, 0])
    return torch.cat(log_p)


def _classify_sets(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_EMF: Tensor,
    noise_EMND: Tensor,
    ways_and_shots: tuple[int, int],
    background: float | None,
    *,
    fit_on_queries: bool,
) -> Tensor:
    """Classify the last P of the M = K * S + P points of each set; the others are the support by class: (E, P, K)."""
    K, S = ways_and_shots
    mean, log_variance = model.posterior(h_EMF)
    z_EMND = sample_latents(mean, log_variance, noise_EMND)
    support_EKTD = z_EMND[:, : K * S].unflatten(1, (K, S)).flatten(2, 3)
    queries_EPND = z_EMND[:, K * S :]
    return fit_log_posteriors(adapt, support_EKTD, queries_EPND, fit_on_queries=fit_on_queries, background=background)[
        1
    ]


def fit_and_classify(
    adapt: AdaptSettings,
    support_EKTD: Tensor,
    query_EPND: Tensor,
    *,
    fit_on_queries: bool = True,
    mask_EKT: Tensor | None = None,
) -> tuple[ClassMixture, Tensor]:
    """Return the Gaussians of `fit_log_posteriors` and the probabilities of the queries, (E, P, K)."""
    mixture, log_p_EPK = fit_log_posteriors(
        adapt, support_EKTD, query_EPND, fit_on_queries=fit_on_queries, mask_EKT=mask_EKT
    )
    return mixture, log_p_EPK.exp().to(query_EPND.dtype)


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
        background: as in `log_posteriors`.

    Returns:
        The Gaussians, and the log-probabilities in float64, (E, P, K), or (E, P, K + 1) with a background component.

    Raises:
        DataError: a probability is not a number.
    """
    E, P, N, _ = query_EPND.shape
    points_EPD = query_EPND.flatten(1, 2)
    mixture = fit_semi_supervised(
        support_EKTD,
        points_EPD if fit_on_queries else points_EPD[:, :0],
        iterations=adapt.iterations,
        e_step=adapt.e_step,
        temperature=adapt.temperature,
        mask_EKT=mask_EKT,
        prior_count=adapt.proportions_prior * N if adapt.proportions == "estimated" else None,
        background=background,
    )
    logits_EPK = class_logits(mixture, points_EPD, adapt.final_covariance, adapt.temperature)
    log_posterior = torch.log_softmax(with_background(logits_EPK, background), dim=2).view(E, P, N, -1)
    mean_EPK = log_posterior.exp().mean(dim=2)
    if not torch.isfinite(mean_EPK).all():
        # The argmax of NaN is the first class, which would pass for a prediction and count as chance.
        raise DataError(
            f"the model gives NaN instead of probabilities: its weights or adapt.temperature ({adapt.temperature:g}) "
            "are wrong; use another checkpoint"
        )
    # The logarithm keeps the differences of probabilities that are too small for their type. That of a larger one comes
    # from the mean itself, so that no rounding changes which class is the most probable.
    small_EPK = torch.logsumexp(log_posterior.double(), dim=2) - math.log(N)
    return mixture, torch.where(mean_EPK > SMALL, mean_EPK.double().clamp_min(SMALL).log(), small_EPK)


def calibrated(log_p_EPK: Tensor, temperature: float) -> Tensor:
    """Return p^(1 / temperature), divided by its sum over the classes: (..., K), float64 log p -> probabilities.

    The order of the classes stays the same, so accuracy does not depend on the temperature. Above 1 the probabilities
    become less certain, below 1 more certain. The result is float64: rounding to float32 can make the two most probable
    classes equal.
    """
    return log_p_EPK.exp() if temperature == 1 else torch.softmax(log_p_EPK / temperature, dim=-1)


def latent_noise(model: MetaGMVAE, adapt: AdaptSettings, points: int, seed: int, device: torch.device) -> Tensor:
    """Draw the standard normal noise of the latents of one episode, (points, N, D)."""
    generator = keyed_generator(device, "predict", int(seed))
    return torch.randn(points, adapt.samples, model.latent, generator=generator, device=device)


def inductive_noise(
    model: MetaGMVAE, adapt: AdaptSettings, support_images: int, seed: int, device: torch.device
) -> Tensor:
    """Draw the noise of the support and one query, (support_images + 1, N, D).

    All queries share one draw: with noise by position, the answer for a query would depend on its place among the
    others. All support images share another draw, so it does not depend on their order and on the names of the classes.
    """
    noise_MND = latent_noise(model, adapt, support_images + 1, seed, device)
    return torch.cat([noise_MND[:1].expand(support_images, -1, -1), noise_MND[-1:]])


def episodes_per_batch(points: int, adapt: AdaptSettings, latent: int, device: torch.device) -> int:
    """Return how many episodes of this many points (support and queries) fit one batch; at least 1."""
    return max(1, MAX_LATENT_VALUES[device.type] // (8 * points * adapt.samples * latent))
