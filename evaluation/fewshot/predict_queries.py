"""Class probabilities of queries in one task whose classes may have different numbers of labelled images.

The equations are in `predict`; here the support is padded to equal shots and masked.

Notation: T labelled images, P queries, K classes, N Monte Carlo samples, F features, D latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.predict import (
    PredictionMode,
    calibrated,
    fit_log_posteriors,
    inductive_noise,
    latent_noise,
)
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
    posterior_temperature: float = 1.0,
    background: float | None = None,
) -> Tensor:
    """Return p(y | x, D) of every query (Eq. 10 and 11), (P, K); float64 at another temperature than 1.

    In both modes the result does not depend on the order of the support and the names of the classes: the support is
    sorted by content first. In transductive mode it depends on the order of the queries, by the Monte Carlo noise.
    For equal shots the result equals that of `predict_episodes`, in transductive mode for a support sorted in this way,
    up to rounding.

    Args:
        model: on the device of the features.
        adapt: settings of EM.
        h_TF: features of the labelled images, by `encode_images`.
        label_T: their classes, 0 to K - 1; each class occurs at least once.
        h_PF: features of the queries.
        mode: as in `predict_episodes`.
        seed: of the Monte Carlo noise.
        posterior_temperature: as in `calibrated`.
        background: as in `log_posteriors`; the last column is then the probability that a query is of no labelled
            class, (P, K + 1).

    Raises:
        DataError: a probability is not a number.
    """
    model.eval()
    order, rank_K = _canonical_order(h_TF, label_T)
    h_TF, label_T = h_TF[torch.as_tensor(order)], rank_K[label_T][order]

    def classify(query_PF: Tensor, noise_MND: Tensor, *, fit_on_queries: bool) -> Tensor:
        mean, log_variance = model.posterior(torch.cat([h_TF, query_PF])[None])
        z_MND = sample_latents(mean, log_variance, noise_MND[None])[0]
        z_TND, z_PND = z_MND[: len(h_TF)], z_MND[len(h_TF) :]
        return classify_latents(adapt, z_TND, label_T, z_PND, fit_on_queries=fit_on_queries, background=background)

    if mode == "transductive":
        noise_MND = latent_noise(model, adapt, len(h_TF) + len(h_PF), seed, h_TF.device)
        log_p_PK = classify(h_PF, noise_MND, fit_on_queries=True)
    else:
        noise_MND = inductive_noise(model, adapt, len(h_TF), seed, h_TF.device)
        log_p_PK = torch.cat([classify(h_1F, noise_MND, fit_on_queries=False) for h_1F in h_PF.split(1)])
    columns = [*rank_K.tolist(), *range(len(rank_K), log_p_PK.shape[1])]
    p_PK = calibrated(log_p_PK[:, columns], posterior_temperature)
    return p_PK.to(h_PF.dtype) if posterior_temperature == 1 else p_PK


def _canonical_order(h_TF: Tensor, label_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an order of the support and of the classes that depends on the features only.

    With it the answer is the same bit for bit, in whatever order the support is given and however classes are called.

    Returns:
        The rows of the support by class and within it by content, (T,), and the new number of each class, (K,).
    """
    content = [row.tobytes() for row in h_TF.float().cpu().numpy()]
    by_content = np.array(sorted(range(len(content)), key=content.__getitem__))
    first_K = np.unique(label_T[by_content], return_index=True)[1]
    rank_K = np.argsort(np.argsort(first_K))
    return by_content[np.argsort(rank_K[label_T][by_content], kind="stable")], rank_K


def classify_latents(
    adapt: AdaptSettings,
    z_TND: Tensor,
    label_T: np.ndarray,
    z_PND: Tensor,
    *,
    fit_on_queries: bool,
    background: float | None = None,
) -> Tensor:
    """Return log p(y | z) of the queries, averaged over their samples, after semi-supervised EM on the latents: (P, K).

    Args:
        adapt: settings of EM.
        z_TND: latents of the labelled images.
        label_T: their classes, 0 to K - 1.
        z_PND: latents of the queries.
        fit_on_queries: False fits the Gaussians to the support alone (inductive).
        background: as in `log_posteriors`.
    """
    shots_K = np.bincount(label_T)
    K, S, (_, N, D) = len(shots_K), int(shots_K.max()), z_TND.shape
    support_KSND, mask_KSN = z_TND.new_zeros(K, S, N, D), z_TND.new_zeros(K, S, N)
    for k, shots in enumerate(shots_K):
        support_KSND[k, :shots] = z_TND[torch.as_tensor(label_T == k)]
        mask_KSN[k, :shots] = 1
    support_1KTD, mask_1KT = support_KSND.flatten(1, 2)[None], mask_KSN.flatten(1, 2)[None]
    _, log_p_1PK = fit_log_posteriors(
        adapt, support_1KTD, z_PND[None], fit_on_queries=fit_on_queries, mask_EKT=mask_1KT, background=background
    )
    return log_p_1PK[0]
