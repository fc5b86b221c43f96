"""What a method must offer to be trained, and the methods by name.

A method is trained by the loop of all stages and used through `MetaLearner`. To add one, write a model class
(`MetaLearner`) and a `Method`, and add it to `METHODS`, or to the entry points `metagmvae.methods` of another package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.pipelines.grouped_labels import EpisodeLabels, GroupedLabels, class_ids
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.sampling.stream import Stream
from metagmvae.training.models.meta_learner import MetaLearner


@dataclass(frozen=True)
class MethodData:
    """What meta-training reads."""

    rows: Rows | StreamedImages
    """Images, uint8 (n, C, H, W), or for a method `on_features` the scaled features of the frozen encoder, (n, F)."""
    images: Rows | StreamedImages
    """Images, or the raw features of a dataset of features."""
    episode_labels: EpisodeLabels | None
    """Classes of the rows, and their groups, such as patients, if the dataset has groups; only if the method asks for
    labels (`needs_labels`)."""
    embedding: Callable[[], np.ndarray]
    """Returns the features of the frozen encoder for all images, float32 (n, F)."""
    remember: Callable[[str, Callable[[], np.ndarray]], np.ndarray] = lambda name, compute: compute()
    """Returns the array of a name that the checkpoint holds, or else the result of a function, the same on all ranks.
    Later checkpoints hold it, so that a resumed run does not compute it again."""

    @property
    def labels(self) -> np.ndarray | None:
        """Classes of the rows, int64 (n,); only if the method asks for them."""
        return None if self.episode_labels is None else class_ids(self.episode_labels)


class Method(ABC):
    """How the model of a method is built and meta-trained."""

    reads_sequentially = False
    """Whether its stream can read `StreamedImages` (`data.reader = "stream"`)."""

    @abstractmethod
    def build(self, model: ModelSettings, method: MethodSettings, image_shape: tuple[int, int, int]) -> MetaLearner:
        """A new model; the caller seeds the global generator of torch. Packages use the names of its parameters."""

    @abstractmethod
    def step(self, model: Any, settings: Settings) -> nn.Module:
        """The step module of meta-training: batch -> (loss, metrics), with `prepare` and `compute` (`MetaStep`).

        It also decides which parameters are trained: those with `requires_grad`.
        """

    @abstractmethod
    def stream(self, data: MethodData, settings: Settings, **position: Any) -> Stream:
        """Batches of the steps; `position` are the arguments of `Stream` except images and batch size."""

    @abstractmethod
    def images_per_step(self, settings: Settings) -> int:
        """Images of a step over all ranks, for the reported throughput."""

    def on_features(self, settings: Settings) -> bool:
        """Whether meta-training reads the scaled features of the frozen encoder instead of images."""
        return False

    def needs_encoder(self, settings: Settings) -> bool:
        """Whether the encoder must be trained before meta-training."""
        return self.on_features(settings)

    def needs_labels(self, settings: Settings) -> bool:
        """Whether meta-training reads the classes of the training images."""
        return False

    def check_data(self, settings: Settings, images: int, labels: np.ndarray | None) -> None:
        """Check before the training that the data suffice; here nothing is checked.

        Args:
            settings: of the run.
            images: number of training images.
            labels: their classes, -1 for none; only if the method asks for them.

        Raises:
            DataError: naming the setting and the remedy.
        """
        return

    def check_groups(self, settings: Settings, labels: GroupedLabels) -> None:
        """Check before the training that the groups suffice, if the method asks for labels and the dataset has groups;
        here nothing is checked.

        Raises:
            DataError: naming the setting and the remedy.
        """
        return

    def needs_steps(self, settings: Settings) -> bool:
        """Whether there is something to meta-train: `train.steps` must then be above 0, else 0."""
        return True

    def start(self, model: Any, settings: Settings, rows: Rows) -> None:
        """Initialise the model from the scaled features before the first step; here nothing is done."""
        return
