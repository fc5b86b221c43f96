"""Training of the methods that learn from few-shot tasks: one step module, and the classes of the tasks.

Notation: b tasks of this rank, K ways, S labelled images and Q queries per class, n = S + Q.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.pipelines.grouped_labels import GroupedLabels
from metagmvae.pipelines.records import DataError, TaskBatch
from metagmvae.pipelines.sampling.episodes import left_out_line
from metagmvae.pipelines.sampling.group_draw import GroupDraw
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.sampling.task_stream import TaskStream
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.augment.view import View
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import episode_generators, to_device
from metagmvae.training.methods.cactus import check_clusters, feature_partitions
from metagmvae.training.methods.method import Method, MethodData
from metagmvae.training.methods.task_learner import TaskLearner
from metagmvae.training.methods.umtra import augmented_queries
from metagmvae.training.models.encoders import EncoderModel

LOG = logging.getLogger(__name__)


class TaskStep(nn.Module):
    """The loss of b training tasks.

    Args:
        model: the model to train.
        settings: of the run.
        view: makes the queries from the labelled images (`method.tasks = "images"`). None: the batch has them.
    """

    def __init__(self, model: TaskLearner, settings: Settings, view: View | None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.view = view
        model.freeze()
        model.channels_last = settings.train.channels_last

    def train(self, mode: bool = True) -> TaskStep:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.model.encoder.train(mode and self.model.own_body is None)
        return self

    def forward(self, batch: TaskBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the tasks of a batch."""
        return self.compute(*self.prepare(batch))

    def prepare(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Labelled images, (b, K, S, ...), and queries, (b, K, Q, ...), in [0, 1] or as scaled features."""
        method = self.settings.method
        data = to_device(batch.images, next(self.model.parameters()).device)
        if self.view is None:
            x = data if self.model.on_features else EncoderModel.scale_images(data)
            support, query = x.split([method.shot, method.query], dim=2)
            return support, query
        x = EncoderModel.scale_images(data)
        generators = episode_generators(x.device, self.settings.train.seed, "tasks", batch.tasks)
        query = augmented_queries(x, self.view, generators, method.query)
        return self._inputs(x), self._inputs(query)

    def _inputs(self, x_bKn: Tensor) -> Tensor:
        """What the body reads, of images in [0, 1], (b, K, n, C, H, W): the images, or their features, (b, K, n, F)."""
        with torch.no_grad():  # a frozen encoder
            return self.model.body_inputs(x_bKn.flatten(0, 2)).unflatten(0, x_bKn.shape[:3])

    def compute(self, support: Tensor, query: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics from the results of `prepare`."""
        with autocast(support.device, self.settings.train.precision):
            return self.model.task_loss(support, query)


class TaskMethod(Method):
    """A method whose model is a `TaskLearner`.

    Args:
        model: its class.
        trains: whether it is meta-trained at all.
    """

    def __init__(self, model: type[TaskLearner], *, trains: bool = True) -> None:
        self.model = model
        self.trains = trains

    def build(self, model: ModelSettings, method: MethodSettings, image_shape: tuple[int, int, int]) -> TaskLearner:
        """A new model."""
        return self.model(model, method, image_shape)

    def step(self, model: TaskLearner, settings: Settings) -> nn.Module:
        """The step module."""
        view = build_view(settings.pretrain, model) if settings.method.tasks == "images" else None
        return TaskStep(model, settings, view)

    def stream(self, data: MethodData, settings: Settings, **position: Any) -> TaskStream:
        """Tasks whose classes are labels, clusters or single images (`method.tasks`)."""
        method = settings.method
        rows = data.images if method.tasks == "images" else data.rows
        assert not isinstance(rows, StreamedImages)  # refused by the settings
        partitions: Sequence[np.ndarray] = []
        if method.tasks == "labels":
            assert data.labels is not None
            partitions = [data.labels]
        elif method.tasks == "clusters":
            partitions = self._partitions(data, settings)
        per_class = method.shot + method.query if partitions else 1
        options: dict[str, Any] = {"batch": settings.train.batch, "way": method.way, "per_class": per_class}
        if method.tasks == "labels" and isinstance(data.episode_labels, GroupedLabels):
            options["grouped"] = GroupDraw(data.episode_labels, shot=method.shot, query=method.query)
        return TaskStream(rows, partitions, **options, **position)

    def _partitions(self, data: MethodData, settings: Settings) -> list[np.ndarray]:
        """Clusters of all images in each partition, (n,).

        Raises:
            DataError: the checkpoint holds others; or as `feature_partitions`.
        """
        shape = settings.method.partitions, len(data.images)
        labels_Pn = data.remember(
            "partitions", lambda: feature_partitions(data.embedding(), settings.method, settings.train.seed)
        )
        if labels_Pn.shape != shape:
            raise DataError(
                f"checkpoint: its partitions have the shape {labels_Pn.shape} instead of {shape}; restore another one, "
                "or start a new run in another folder (run.out)"
            )
        return list(labels_Pn)

    def images_per_step(self, settings: Settings) -> int:
        """Images of a step, queries included."""
        method = settings.method
        return settings.train.batch * method.way * (method.shot + method.query)

    def on_features(self, settings: Settings) -> bool:
        """Whether a perceptron on features is trained."""
        return settings.method.network == "mlp"

    def needs_encoder(self, settings: Settings) -> bool:
        """Features and clusters come from a trained encoder."""
        return self.on_features(settings) or (self.trains and settings.method.tasks == "clusters")

    def needs_labels(self, settings: Settings) -> bool:
        """Whether the classes of the tasks are labels."""
        return self.trains and settings.method.tasks == "labels"

    def check_data(self, settings: Settings, images: int, labels: np.ndarray | None) -> None:
        """Check that a task can be drawn; of clusters only that there are enough images."""
        method = settings.method
        if not self.trains:
            if settings.pretrain.steps and method.network == "encoder":
                raise DataError(
                    f"pretrain.steps is {settings.pretrain.steps}, but {method.name} trains a new network on each task "
                    "and uses no pre-trained one; set it to 0"
                )
            return
        if method.tasks == "clusters":
            check_clusters(images, method)
            return
        partitions = [] if labels is None else [labels]
        per_class = 1 if labels is None else method.shot + method.query
        position: dict[str, Any] = {"seed": 0, "split": settings.data.train_split}
        TaskStream(np.empty((images, 0)), partitions, batch=1, way=method.way, per_class=per_class, **position)

    def check_groups(self, settings: Settings, labels: GroupedLabels) -> None:
        """Check that labelled images and queries of different groups can be drawn; a line names other classes."""
        method = settings.method
        draw = GroupDraw(labels, shot=method.shot, query=method.query)
        options: dict[str, Any] = {"batch": 1, "way": method.way, "per_class": method.shot + method.query}
        options |= {"grouped": draw, "seed": 0, "split": settings.data.train_split}
        TaskStream(np.empty((len(labels.classes), 0)), [labels.classes], **options).rows(0)
        if draw.left_out:
            LOG.warning("%s", left_out_line("training", method.shot, method.query, draw.left_out_names))

    def needs_steps(self, settings: Settings) -> bool:
        """Whether the method is meta-trained."""
        return self.trains
