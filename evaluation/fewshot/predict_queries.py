"""Class probabilities of queries in one task whose classes may have different numbers of labelled images.

The equations are in `predict`; here the support is padded to equal shots and masked.

Notation: T labelled images, P queries, K classes, N Monte Carlo samples, F features, D latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.predict import PredictionMode, fit_and_classify, latent_noise
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.meta_gmvae import MetaGMVAE, sample_latents


@torch.inference_mode()
def predict_queries(
    model: MetaGMVAE,
    adapt: AdaptSettings,
    h_TF: Tensor,
    label_T: np.ndarray,
    h_PF: Tensor,
    *,
    mode: PredictionMode = "transductive",
    seed: int = 0,
) -> Tensor:
    """Return p(y | x, D) of every query (Eq. 10 and 11), (P, K).

    For equal shots the result equals that of `predict_episodes` up to rounding.

    Args:
        model: on the device of the features.
        adapt: settings of EM.
        h_TF: features of the labelled images, by `encode_images`.
        label_T: their classes, 0 to K - 1; each class occurs at least once.
        h_PF: features of the queries.
        mode: as in `predict_episodes`.
        seed: of the Monte Carlo noise.

    Raises:
        DataError: the model gives NaN. (The argmax of NaN is the first class, which would pass for a prediction.)
    """
    model.eval()
    order = np.argsort(label_T, kind="stable")
    h_TF, label_T = h_TF[torch.as_tensor(order)], label_T[order]
    noise = latent_noise(model, adapt, len(h_TF) + len(h_PF), seed, h_TF.device)
    support_noise, query_noise = noise[: len(h_TF)], noise[len(h_TF) :]

    def classify(rows: slice, *, fit_on_queries: bool) -> Tensor:
        mean, log_variance = model.posterior(torch.cat([h_TF, h_PF[rows]])[None])
        z_MND = sample_latents(mean, log_variance, torch.cat([support_noise, query_noise[rows]])[None])[0]
        z_TND, z_PND = z_MND[: len(h_TF)], z_MND[len(h_TF) :]
        return classify_latents(adapt, z_TND, label_T, z_PND, fit_on_queries=fit_on_queries)

    if mode == "transductive":
        probabilities_PK = classify(slice(None), fit_on_queries=True)
    else:
        one_by_one = [classify(slice(p, p + 1), fit_on_queries=False) for p in range(len(h_PF))]
        probabilities_PK = torch.cat(one_by_one)
    if not torch.isfinite(probabilities_PK).all():
        raise DataError("the model gives NaN instead of probabilities: its weights are broken; use another checkpoint")
    return probabilities_PK


def classify_latents(
    adapt: AdaptSettings, z_TND: Tensor, label_T: np.ndarray, z_PND: Tensor, *, fit_on_queries: bool
) -> Tensor:
    """Return p(y | z) of the queries, averaged over their samples, after semi-supervised EM on the latents: (P, K).

    Args:
        adapt: settings of EM.
        z_TND: latents of the labelled images.
        label_T: their classes, 0 to K - 1.
        z_PND: latents of the queries.
        fit_on_queries: False fits the Gaussians to the support alone (inductive).
    """
    shots_K = np.bincount(label_T)
    K, S, (_, N, D) = len(shots_K), int(shots_K.max()), z_TND.shape
    support_KSND, mask_KSN = z_TND.new_zeros(K, S, N, D), z_TND.new_zeros(K, S, N)
    for k, shots in enumerate(shots_K):
        support_KSND[k, :shots] = z_TND[torch.as_tensor(label_T == k)]
        mask_KSN[k, :shots] = 1
    support_1KTD, mask_1KT = support_KSND.flatten(1, 2)[None], mask_KSN.flatten(1, 2)[None]
    _, probabilities_1PK = fit_and_classify(
        adapt, support_1KTD, z_PND[None], fit_on_queries=fit_on_queries, mask_EKT=mask_1KT
    )
    return probabilities_1PK[0]
