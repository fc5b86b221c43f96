"""Class probabilities of queries in one task whose classes may have different numbers of labelled images.

Notation: T labelled images, P queries, K classes, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.predict import calibrated
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import UNCALIBRATED, CalibrationMap


@torch.inference_mode()
def predict_queries(
    model: MetaLearner,
    adapt: AdaptSettings,
    h_TF: Tensor,
    label_T: np.ndarray,
    h_PF: Tensor,
    *,
    mode: PredictionMode = "transductive",
    seed: int = 0,
    calibration: CalibrationMap = UNCALIBRATED,
    background: float | None = None,
) -> Tensor:
    """Return p(y | x, D) of every query (Eq. 10 and 11), (P, K); float64 if they are calibrated.

    In both modes the result does not depend on the order of the support and the names of the classes: the support is
    sorted by content first. In transductive mode it depends on the order of the queries, by the Monte Carlo noise.
    For equal shots the result equals that of `log_posteriors`, in transductive mode for a support sorted in this way,
    up to rounding.

    Args:
        model, adapt, mode, calibration: as in `evaluate_features`.
        h_TF: features of the labelled images, by `encode_images`.
        label_T: their classes, 0 to K - 1; each class occurs at least once.
        h_PF: features of the queries.
        seed: of the Monte Carlo noise.
        background: as in `log_posteriors`; the last column is then the probability that a query is of no labelled
            class, (P, K + 1).

    Raises:
        DataError: a probability is not a number.
    """
    model.eval()
    order, rank_K = _canonical_order(h_TF, label_T)
    support_1T, sorted_T = h_TF[torch.as_tensor(order)][None], torch.as_tensor(rank_K[label_T][order])
    # Separate calls, so that rounding does not depend on the other queries; but one, where each would fit the support.
    batches = h_PF.split(1) if mode == "inductive" and not model.fits_support else [h_PF]
    options: dict[str, Any] = {"mode": mode, "seed_by_episode": [seed], "background": background}
    log_p_PK = torch.cat(
        [model.log_posteriors(adapt, support_1T, sorted_T, query[None], **options)[0] for query in batches]
    )
    columns = [*rank_K.tolist(), *range(len(rank_K), log_p_PK.shape[1])]
    p_PK = calibrated(log_p_PK[:, columns], calibration)
    return p_PK.to(h_PF.dtype) if calibration.is_identity else p_PK


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
