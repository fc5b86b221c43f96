"""One episode from a user's hands: any labels, unequal shots. `evaluation.predict` does the same for batches.

Notation: T labelled images in all, K classes, P queries, N samples, F features, D latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.schema import AdaptSettings
from evaluation.predict import Mode, classify
from pipelines.records import DataError
from training.meta_gmvae import MetaGMVAE, sample_latents
from training.steps import keyed_generator


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
        return _numbers(_judge(model, adapt, h_TF, label_T, h_PF, noise[:T], noise[T:], fit_on_queries=True))
    rows = [
        _judge(model, adapt, h_TF, label_T, h_PF[p : p + 1], noise[:T], noise[T + p : T + p + 1], fit_on_queries=False)
        for p in range(len(h_PF))
    ]
    return _numbers(torch.cat(rows))


def _numbers(probabilities: Tensor) -> Tensor:
    if not torch.isfinite(probabilities).all():
        raise DataError("the model gives NaN instead of probabilities: its weights are broken; use another checkpoint")
    return probabilities


def _judge(
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
    return classify(adapt, support_1KTD, z_PND[None], fit_on_queries=fit_on_queries, present_EKT=present_1KT)[1][0]
