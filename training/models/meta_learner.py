"""What a method of few-shot classification must offer: how its model adapts to labelled images and queries.

Notation: E episodes, T labelled images, P queries, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.models.encoders import EncoderModel

PredictionMode = Literal["transductive", "inductive"]
"""Whether the queries of an episode are classified together or one at a time; see `MetaLearner.log_posteriors`."""


class MetaLearner(EncoderModel, ABC):
    """A model that classifies queries by a few labelled images.

    Evaluation, classification, calibration and serving use nothing else of a method. They encode each image once by
    `encode_images`, and give the results to `log_posteriors`. A method that adapts on images instead of features
    returns the images themselves from `encode_images`.
    """

    scale: nn.Module
    """Scaling of the encoder's features before the method sees them; the identity where it reads images."""
    has_background = False
    """Whether `log_posteriors` has a component for queries of no labelled class."""
    modes: tuple[PredictionMode, ...] = ("transductive", "inductive")
    """Modes that it can answer in."""
    fits_support = False
    """Whether `log_posteriors` fits a network or classifier to the support. It is then called once for all queries of a
    support; else in inductive mode once for each query, so that not even rounding depends on the other queries."""

    @property
    def most_classes(self) -> int | None:
        """Largest number of classes of a task; None: any number."""
        return None

    @property
    def reads_features(self) -> bool:
        """Whether `encode_images` is `scale_features` of the features of the encoder, so that these can be stored."""
        return True

    @abstractmethod
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
        """Return the log-probabilities of the classes of every query, float64, (E, P, K).

        Args:
            adapt: settings of the adaptation.
            support_ET: what `encode_images` returns for the labelled images, (E, T, ...).
            label_T: their classes, int64, 0 to K - 1, the same in all episodes; each class occurs.
            query_EP: what `encode_images` returns for the queries, (E, P, ...).
            mode: `transductive`: all queries of an episode may be used together. `inductive`: the probabilities of a
                query depend on the support and this query only.
            seed_by_episode: seeds of random numbers, so that results do not depend on the batching.
            background: level of a component for queries of no labelled class, whose probability is the last column,
                (E, P, K + 1). None: no such component. Only given if `has_background`.

        Raises:
            DataError: a probability is not a number.
        """

    @abstractmethod
    def episodes_per_batch(self, adapt: AdaptSettings, points: int, device: torch.device) -> int:
        """Return how many episodes of this many points (support and queries) fit one call; at least 1."""
