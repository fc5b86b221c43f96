"""Prototypical networks (Snell, Swersky and Zemel, NeurIPS 2017): classes as means of embeddings.

    p(y = k | x) = softmax_k(-||f(x) - c_k||^2),    c_k = mean of f over the labelled images of class k    (Eq. 1 and 2)

Notation: n images, b tasks or E episodes, K ways, S labelled images and Q queries per class, T labelled images,
P queries, F embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.methods.task_learner import TaskLearner, log_probabilities, query_loss
from metagmvae.training.models.meta_learner import PredictionMode

MAX_EMBEDDING_VALUES = 2**26
"""Maximum number of embedding values in a batch of episodes."""


class ProtoNets(TaskLearner):
    """The body embeds images; each query is classified alone, so both modes give the same answer."""

    def encode_images(self, x: Tensor) -> Tensor:
        """Embeddings of images in [0, 1], (n, C, H, W) -> (n, F)."""
        return at_least_float32(self.body(self.body_inputs(x)))

    @property
    def reads_features(self) -> bool:
        """Whether the embeddings are the features of the encoder, or are computed from them."""
        return self.on_features or self.own_body is None

    def scale_features(self, h: Tensor) -> Tensor:
        """Embeddings of images with these raw features of the encoder, (n, F)."""
        scaled = super().scale_features(h)
        return at_least_float32(self.body(scaled)) if self.on_features else scaled

    def task_loss(self, support_bKS: Tensor, query_bKQ: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean negative log-likelihood of the queries, and their accuracy."""
        S = support_bKS.shape[2]
        images = torch.cat([support_bKS, query_bKQ], dim=2)
        embedded = at_least_float32(self.body(images.flatten(0, 2))).unflatten(0, images.shape[:3])
        prototypes_bKF = embedded[:, :, :S].mean(dim=2)
        return query_loss(prototype_logits(prototypes_bKF, embedded[:, :, S:].flatten(1, 2)))

    def log_posteriors(
        self,
        adapt: AdaptSettings,
        support_ET: Tensor,
        label_T: Tensor,
        query_EP: Tensor,
        *,
        mode: PredictionMode,
        seed_by_episode: Sequence[int],
        background: float | None = None,
    ) -> Tensor:
        """Log-probabilities of the queries, as `MetaLearner.log_posteriors`, from embeddings."""
        one_hot_TK = F.one_hot(label_T).to(support_ET)
        prototypes_EKF = one_hot_TK.T @ support_ET / one_hot_TK.sum(dim=0)[:, None]
        return log_probabilities(prototype_logits(prototypes_EKF, query_EP))

    def episodes_per_batch(self, adapt: AdaptSettings, points: int, device: torch.device) -> int:
        """Return how many episodes of this many points fit one call; at least 1."""
        return max(1, MAX_EMBEDDING_VALUES // (points * self.body_dim))


def prototype_logits(prototypes_EKF: Tensor, query_EPF: Tensor) -> Tensor:
    """Negative squared Euclidean distances, (E, K, F) and (E, P, F) -> (E, P, K)."""
    # Differences of coordinates: an expansion of the square is inexact where the distances are small.
    return -torch.cdist(query_EPF, prototypes_EKF, compute_mode="donot_use_mm_for_euclid_dist").square()
