"""From images to class probabilities: each image through the convolutions once, episodes in batches.

Notation: E episodes, K ways, S shots, P queries of an episode, N Monte Carlo samples, F features, D latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.device.seeding import keyed_generator, to_device
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_gmvae import MetaGMVAE, sample_latents
from metagmvae.training.objectives.mixture import ClassMixture, class_log_posterior, fit_semi_supervised

Mode = Literal["transductive", "inductive"]

VALUES_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}
"""Bound on latent values (points x samples x D) that a batch holds; about four arrays of this size live at once. On a
processor small batches are the fast ones (a quarter faster than 2^25, measured): they stay in its caches."""


@torch.inference_mode()
def encode_images(model: EncoderModel, images: Any, device: torch.device, batch: int = 512) -> Tensor:
    """Features of images, each encoded once in evaluation mode: uint8 (n, C, H, W) -> (n, F) on the device.

    On a processor this process keeps freed memory from then on (`training.device.allocator`): twice as fast.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model.eval()
    pieces = []
    for first in range(0, len(images), batch):
        rows = np.arange(first, min(first + batch, len(images)))
        x = model.scale_images(to_device(images[rows], device))
        pieces.append(model.encode_images(x.contiguous(memory_format=torch.channels_last)))
    return torch.cat(pieces)


@torch.inference_mode()
def predict_episodes(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_support_EKSF: Tensor,
    h_query_EPF: Tensor,
    *,
    mode: Mode = "transductive",
    seed_by_episode: Sequence[int],
) -> Tensor:
    """p(y | x, D) of every query (Eq. 10 and 11): probabilities, (E, P, K).

    `transductive`, the paper's protocol: attention and EM see the support and all queries of an episode.
    `inductive`: each query is judged alone. Its set is the support and itself; class means and variances
    come from the support's latents in that set; no query changes what is said of another.

    Args:
        h_support_EKSF, h_query_EPF: features by `encode_images`.
        mode: see above.
        seed_by_episode: key of each episode's Monte Carlo noise: results do not depend on the batch.
    """
    model.eval()
    if mode == "inductive":
        pairs = zip(h_support_EKSF, h_query_EPF, seed_by_episode, strict=True)
        return torch.stack([_inductive(model, adapt, h_KSF, h_PF, seed) for h_KSF, h_PF, seed in pairs])
    _, K, S, _ = h_support_EKSF.shape
    P = h_query_EPF.shape[1]
    noise = torch.stack([_noise(seed, K * S + P, adapt, model, h_query_EPF.device) for seed in seed_by_episode])
    z_ETND = _latents(model, torch.cat([h_support_EKSF.flatten(1, 2), h_query_EPF], dim=1), noise)
    support = z_ETND[:, : K * S].unflatten(1, (K, S)).flatten(2, 3)
    return fit_and_classify(adapt, support, z_ETND[:, K * S :])[1]


def _inductive(model: MetaGMVAE, adapt: AdaptSettings, h_KSF: Tensor, h_PF: Tensor, seed: int) -> Tensor:
    """One episode, every query in a set of its own, in chunks: (P, K)."""
    K, S, _ = h_KSF.shape
    P = len(h_PF)
    noise_PND = _noise(seed, K * S + P, adapt, model, h_PF.device)
    support_noise, query_noise = noise_PND[: K * S], noise_PND[K * S :]
    per_set = (K * S + 1) * adapt.samples * model.latent
    chunk = max(1, VALUES_AT_ONCE[h_PF.device.type] // (4 * per_set))
    answers = []
    for first in range(0, P, chunk):
        queries, own = h_PF[first : first + chunk, None], query_noise[first : first + chunk, None]
        count = len(queries)
        sets = torch.cat([h_KSF.flatten(0, 1).expand(count, -1, -1), queries], dim=1)
        noise = torch.cat([support_noise.expand(count, -1, -1, -1), own], dim=1)
        z_CTND = _latents(model, sets, noise)
        support = z_CTND[:, : K * S].unflatten(1, (K, S)).flatten(2, 3)
        answers.append(fit_and_classify(adapt, support, z_CTND[:, K * S :], fit_on_queries=False)[1][:, 0])
    return torch.cat(answers)


def _noise(seed: int, points: int, adapt: AdaptSettings, model: MetaGMVAE, device: torch.device) -> Tensor:
    generator = keyed_generator(device, "predict", int(seed))
    return torch.randn(points, adapt.samples, model.latent, generator=generator, device=device)


def _latents(model: MetaGMVAE, h_ETF: Tensor, noise_ETND: Tensor) -> Tensor:
    mean, log_variance = model.posterior(h_ETF)
    return sample_latents(mean, log_variance, noise_ETND)


def fit_and_classify(
    adapt: AdaptSettings,
    support_EKTD: Tensor,
    z_EPND: Tensor,
    *,
    fit_on_queries: bool = True,
    mask_EKT: Tensor | None = None,
) -> tuple[ClassMixture, Tensor]:
    """Semi-supervised EM (Eq. 10), then the mean over samples of p(y | z) (Eq. 11): the mixture, and (E, P, K).

    The one place that takes the settings of an adaptation apart.
    """
    E, P, N, _ = z_EPND.shape
    query_EPD = z_EPND.flatten(1, 2)
    mixture = fit_semi_supervised(
        support_EKTD,
        query_EPD if fit_on_queries else query_EPD[:, :0],
        iterations=adapt.iterations,
        e_step=adapt.e_step,
        temperature=adapt.temperature,
        mask_EKT=mask_EKT,
    )
    log_posterior = class_log_posterior(mixture, query_EPD, adapt.final_covariance, adapt.temperature)
    return mixture, log_posterior.exp().view(E, P, N, -1).mean(dim=2)


def episodes_at_once(points: int, adapt: AdaptSettings, latent: int, device: torch.device) -> int:
    """How many episodes of so many points (support and queries) one batch takes within the bound."""
    return max(1, VALUES_AT_ONCE[device.type] // (8 * points * adapt.samples * latent))


@torch.inference_mode()
def predict_queries(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_TF: Tensor,
    label_T: np.ndarray,
    h_PF: Tensor,
    *,
    mode: Mode = "transductive",
    seed: int = 0,
) -> Tensor:
    """p(y | x, D) of every query by Eq. 10 and 11, (P, K); equals `predict_episodes` where shots are equal.

    Args:
        model, adapt, mode: as there.
        h_TF: features of the labelled images; label_T: their classes, 0 to K - 1, each at least once.
        h_PF: features of the queries.
        seed: of the Monte Carlo noise.

    Raises:
        DataError: the model gives NaN, which would pass for an answer: its largest is the first class.
    """
    model.eval()
    order = np.argsort(label_T, kind="stable")
    h_TF, label_T = h_TF[torch.as_tensor(order)], label_T[order]
    generator = keyed_generator(h_TF.device, "predict", seed)
    noise = torch.randn(len(h_TF) + len(h_PF), adapt.samples, model.latent, generator=generator, device=h_TF.device)
    T = len(h_TF)
    if mode == "transductive":
        return _numbers(_classify_queries(model, adapt, h_TF, label_T, h_PF, noise[:T], noise[T:], fit_on_queries=True))
    rows = [
        _classify_queries(
            model, adapt, h_TF, label_T, h_PF[p : p + 1], noise[:T], noise[T + p : T + p + 1], fit_on_queries=False
        )
        for p in range(len(h_PF))
    ]
    return _numbers(torch.cat(rows))


def _numbers(probabilities: Tensor) -> Tensor:
    if not torch.isfinite(probabilities).all():
        raise DataError("the model gives NaN instead of probabilities: its weights are broken; use another checkpoint")
    return probabilities


def _classify_queries(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_TF: Tensor,
    label_T: np.ndarray,
    h_PF: Tensor,
    support_noise: Tensor,
    query_noise: Tensor,
    *,
    fit_on_queries: bool,
) -> Tensor:
    mean, log_variance = model.posterior(torch.cat([h_TF, h_PF])[None])
    z_UND = sample_latents(mean, log_variance, torch.cat([support_noise, query_noise])[None])[0]
    return classify_latents(adapt, z_UND[: len(h_TF)], label_T, z_UND[len(h_TF) :], fit_on_queries=fit_on_queries)


def classify_latents(
    adapt: AdaptSettings, z_TND: Tensor, label_T: np.ndarray, z_PND: Tensor, *, fit_on_queries: bool
) -> Tensor:
    """Semi-supervised EM over labelled and query latents, then the mean of p(y | z) over samples: (P, K)."""
    counts = np.bincount(label_T)
    longest, N = int(counts.max()), z_TND.shape[1]
    support = z_TND.new_zeros(len(counts), longest, N, z_TND.shape[2])
    present = z_TND.new_zeros(len(counts), longest, N)
    for k, count in enumerate(counts):
        support[k, :count] = z_TND[torch.as_tensor(label_T == k)]
        present[k, :count] = 1
    support_1KTD, present_1KT = support.flatten(1, 2)[None], present.flatten(1, 2)[None]
    return fit_and_classify(adapt, support_1KTD, z_PND[None], fit_on_queries=fit_on_queries, mask_EKT=present_1KT)[1][0]
