"""Class probabilities of the queries of few-shot episodes with equal shots, many episodes at a time.

`calibrated` makes the probabilities agree with the accuracy. Its temperature is another one than
`AdaptSettings.temperature`, which acts inside EM.

Notation: E episodes, K ways, S shots, P queries of an episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.posterior_calibration import CalibrationMap


@torch.inference_mode()
def log_posteriors(
    model: MetaLearner,
    adapt: AdaptSettings,
    support_EKS: Tensor,
    query_EP: Tensor,
    *,
    mode: PredictionMode = "transductive",
    seed_by_episode: Sequence[int],
    background: float | None = None,
) -> Tensor:
    """Return `model.log_posteriors` in evaluation mode, for a support by class, (E, K, S, ...)."""
    model.eval()
    K, S = support_EKS.shape[1:3]
    support_ET, label_T = support_EKS.flatten(1, 2), torch.arange(K).repeat_interleave(S)
    return model.log_posteriors(
        adapt, support_ET, label_T, query_EP, mode=mode, seed_by_episode=seed_by_episode, background=background
    )


def calibrated(log_p_EPK: Tensor, by: CalibrationMap) -> Tensor:
    """Return (1 - u) p^(1 / T) / sum p^(1 / T) + u / K: (..., K), float64 log p -> probabilities.

    The order of the classes stays the same, so accuracy does not depend on the map. The result is float64: rounding to
    float32 can make the two most probable classes equal.
    """
    if by.is_identity:
        return log_p_EPK.exp()
    q_EPK = torch.softmax(log_p_EPK / by.temperature, dim=-1)
    return (1 - by.uniform) * q_EPK + by.uniform / q_EPK.shape[-1]
