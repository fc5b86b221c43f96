"""Class probabilities by the head of an encoder, in one task whose classes may have different numbers of images.

Notation: T labelled images, P queries, K classes, S shots of the class that has most, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.evaluation.fewshot.baselines import fit_logistic_regression, soft_k_means_cosines
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised

COSINE_TEMPERATURE = 20.0
"""Multiplies the cosines of `nearest-mean` in its softmax; the predicted classes do not depend on it."""


@torch.inference_mode()
def predict_with_head(
    head: str, settings: Mapping[str, Any], h_TF: Tensor, label_T: np.ndarray, h_PF: Tensor
) -> np.ndarray:
    """Return the probabilities of the queries, (P, K). They are not calibrated.

    For equal shots the predicted classes are those of the baseline that `evaluation.encoders.heads.HEADS` names.

    Args:
        head: a key of `HEADS`.
        settings: of the head, as they were chosen; missing ones are the defaults.
        h_TF: features of the labelled images.
        label_T: their classes, 0 to K - 1; each class occurs at least once.
        h_PF: features of the queries.
    """
    h_TF, h_PF = h_TF.float(), h_PF.float()
    if head == "logistic-regression":
        model = fit_logistic_regression(h_TF.cpu(), label_T, settings.get("strength", 1.0))
        return model.predict_proba(F.normalize(h_PF, dim=1).cpu().numpy())
    support_1KSF, mask_1KS = _padded(h_TF, label_T)
    if head == "nearest-mean":
        mean_KF = F.normalize((F.normalize(support_1KSF, dim=3) * mask_1KS[..., None]).sum(dim=2)[0], dim=1)
        logits_PK = COSINE_TEMPERATURE * F.normalize(h_PF, dim=1) @ mean_KF.T
    elif head == "soft-k-means":
        temperature = settings.get("temperature", COSINE_TEMPERATURE)
        cosines_1PK = soft_k_means_cosines(support_1KSF, h_PF[None], temperature, iterations=10, mask_EKS=mask_1KS)
        logits_PK = temperature * cosines_1PK[0]
    else:
        e_step, temperature = settings.get("e_step", "identity"), settings.get("temperature", 1.0)
        options: dict[str, Any] = {"iterations": 10, "e_step": e_step, "temperature": temperature}
        mixture = fit_semi_supervised(support_1KSF, h_PF[None], mask_EKT=mask_1KS, **options)
        logits_PK = class_log_posterior(mixture, h_PF[None], e_step, temperature)[0]
    return torch.softmax(logits_PK.double(), dim=1).cpu().numpy()


def _padded(h_TF: Tensor, label_T: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the labelled features by class, padded with zeros, (1, K, S, F), and 1 for each that is real."""
    shots_K = np.bincount(label_T)
    support_KSF = h_TF.new_zeros(len(shots_K), int(shots_K.max()), h_TF.shape[1])
    mask_KS = h_TF.new_zeros(support_KSF.shape[:2])
    for k, shots in enumerate(shots_K):
        support_KSF[k, :shots] = h_TF[torch.as_tensor(label_T == k)]
        mask_KS[k, :shots] = 1
    return support_KSF[None], mask_KS[None]
