"""Answers of the head of an encoder, in one task whose classes may have different numbers of images.

Notation: T labelled images, P queries, K classes, S shots of the class that has most, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.evaluation.fewshot.query_assignments import (
    laplacian_logits,
    optimal_transport_posterior,
    soft_k_means_cosines,
)
from metagmvae.pipelines.records import DataError
from metagmvae.training.objectives.logistic_regression import logistic_regression_logits
from metagmvae.training.objectives.mixture import class_logits, fit_semi_supervised

COSINE_TEMPERATURE = 20.0
"""Multiplies the cosines of `nearest-mean` in its softmax; the predicted classes do not depend on it."""
SMALLEST = 1e-300
"""Probabilities below this are taken for it, so that they have a logarithm."""


@torch.inference_mode()
def head_logits(
    head: str,
    settings: Mapping[str, Any],
    h_TF: Tensor,
    label_T: np.ndarray,
    h_PF: Tensor,
    background: float | None = None,
) -> Tensor:
    """Return the logits of the classes of the queries, float64, (P, K); their softmax are the probabilities.

    For equal shots the predicted classes are those of the baseline that `evaluation.encoders.heads.HEADS` names.

    Args:
        head: a key of `HEADS`.
        settings: of the head, as they were chosen; missing ones are the defaults.
        h_TF: features of the labelled images; other arrays than (T, F) become vectors.
        label_T: their classes, 0 to K - 1; each class occurs at least once.
        h_PF: features of the queries.
        background: logit of a query of no labelled class, which EM takes into account in its E-steps. None: no such
            component. The caller adds it as a column.

    Raises:
        DataError: `optimal-transport` has fewer queries than classes, which it gives the same number of queries each.
    """
    h_TF, h_PF = h_TF.flatten(1).float(), h_PF.flatten(1).float()
    support_1KSF, mask_1KS = _padded(h_TF, label_T)
    query_1PF = h_PF[None]
    if head == "logistic-regression":
        unit_1KSF, unit_1PF = F.normalize(support_1KSF, dim=3), F.normalize(query_1PF, dim=2)
        return logistic_regression_logits(unit_1KSF, unit_1PF, settings.get("strength", 1.0), mask_1KS)[0]
    if head == "nearest-mean":
        mean_KF = F.normalize((F.normalize(support_1KSF, dim=3) * mask_1KS[..., None]).sum(dim=2)[0], dim=1)
        return (COSINE_TEMPERATURE * F.normalize(h_PF, dim=1) @ mean_KF.T).double()
    if head == "soft-k-means":
        temperature = settings.get("temperature", COSINE_TEMPERATURE)
        cosines_1PK = soft_k_means_cosines(support_1KSF, query_1PF, temperature, iterations=10, mask_EKS=mask_1KS)
        return (temperature * cosines_1PK[0]).double()
    if head == "optimal-transport":
        P, K = len(h_PF), support_1KSF.shape[1]
        if P < K:
            raise DataError(
                f"--head optimal-transport: gives each class as many queries, and {P} are fewer than the {K} classes; "
                "give more queries or another --head"
            )
        plan_1PK = optimal_transport_posterior(support_1KSF, query_1PF, settings.get("sharpness", 10.0), mask_1KS)
        return plan_1PK[0].clamp_min(SMALLEST).log()
    if head == "laplacian":
        weight, neighbours = settings.get("weight", 0.7), settings.get("neighbours", 3)
        return laplacian_logits(support_1KSF, query_1PF, weight, neighbours, mask_1KS)[0].double()
    e_step, temperature = settings.get("e_step", "identity"), settings.get("temperature", 1.0)
    options: dict[str, Any] = {"iterations": 10, "e_step": e_step, "temperature": temperature, "background": background}
    mixture = fit_semi_supervised(support_1KSF, query_1PF, mask_EKT=mask_1KS, **options)
    return class_logits(mixture, query_1PF, e_step, temperature)[0].double()


def _padded(h_TF: Tensor, label_T: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the labelled features by class, padded with zeros, (1, K, S, F), and 1 for each that is real."""
    shots_K = np.bincount(label_T)
    support_KSF = h_TF.new_zeros(len(shots_K), int(shots_K.max()), h_TF.shape[1])
    mask_KS = h_TF.new_zeros(support_KSF.shape[:2])
    for k, shots in enumerate(shots_K):
        support_KSF[k, :shots] = h_TF[torch.as_tensor(label_T == k)]
        mask_KS[k, :shots] = 1
    return support_KSF[None], mask_KS[None]
