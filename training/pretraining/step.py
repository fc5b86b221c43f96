"""What every objective of pre-training offers: an auxiliary module and a step module.

The **auxiliary module** has what is trained or remembered beside the encoder: projection head, decoder, critic, queue.
It is stored in checkpoints under `projector`, its buffers included, so that a resumed run continues exactly. The **step
module** gives the loss of a batch. One optimiser minimises it: an adversarial loss is a sum in which the gradient of
each term reaches only the networks that it trains.

A new objective: one file with a subclass of `PretrainStep`, and a line in `objectives_by_name.py`, or, in another
package, in the entry points `metagmvae.objectives`. Keyword-only parameters of its `__init__` are its options
(`pretrain.options`).

Notation: n images of this rank, F feature size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import PretrainSettings, Settings, TrainSettings
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.indexed import batches_per_epoch
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.device import distributed
from metagmvae.training.device.memory_format import channels_last
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import keyed_generator, to_device
from metagmvae.training.models.encoders import EncoderModel

PretrainMetrics = dict[str, Tensor]
"""Scalars without gradient, for the metric lines."""


class PretrainStep(nn.Module):
    """Base class of the step modules: batch -> (loss, metrics).

    `prepare` copies the batch to the device and draws all random numbers, from generators keyed by (seed, purpose,
    step, rank). `compute` is a function of these tensors with fixed shapes that reads no value of the device back, so
    it can be captured as a CUDA graph; it may update buffers of the auxiliary module in place.

    Args:
        model: the model whose encoder is trained.
        auxiliary: the auxiliary module of the same objective.
        settings: seed, precision and memory format.
        pretrain: the settings of the objective.
    """

    needs_rows: ClassVar[bool] = False
    """Whether batches are (images, step, row indices) instead of (images, step)."""

    def __init__(
        self, model: EncoderModel, auxiliary: nn.Module, settings: TrainSettings, pretrain: PretrainSettings
    ) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.auxiliary = auxiliary
        self.settings = settings
        self.pretrain = pretrain
        self.image_shape = model.image_shape
        self.input_shape = model.input_shape

    @classmethod
    def build_auxiliary(cls, model: EncoderModel, settings: Settings, images: int) -> nn.Module:
        """The auxiliary module, newly initialised from the global random state, for training on `images` images."""
        raise NotImplementedError

    @classmethod
    def check_images(cls, settings: Settings, images: int) -> None:
        """Check the settings against the number of training images, before a run starts.

        Raises:
            DataError: there are too few images.
        """
        if settings.data.reader != "stream":
            batches_per_epoch(images, settings.pretrain.batch)

    def forward(self, *batch: Any) -> tuple[Tensor, PretrainMetrics]:
        """Loss and metrics of a batch: uint8 images (n, C, H, W), the number of the step, and rows if needed."""
        return self.compute(*self.prepare(*batch))

    # Any arguments: each objective states its own.
    def prepare(self, *batch: Any, **named: Any) -> tuple[Tensor, ...]:
        """The inputs of `compute`, from a batch."""
        raise NotImplementedError

    def compute(self, *inputs: Any, **named: Any) -> tuple[Tensor, PretrainMetrics]:
        """Loss and metrics from the results of `prepare`."""
        raise NotImplementedError

    def start_step(self, step: int, images: Rows | StreamedImages) -> Iterable[nn.Parameter]:
        """Work before step number `step`, counted from 1, on all ranks, such as clustering all training images.

        Returns:
            Parameters that were initialised again, whose state in the optimiser begins anew.
        """
        return ()

    def _images(self, images: object) -> Tensor:
        """The images on the device, float32 in [0, 1], as they are."""
        return EncoderModel.scale_images(to_device(images, next(self.encoder.parameters()).device))

    def _resized(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """Images of a size (height, width), as `MultiCropEncoder` resizes them."""
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        device = next(self.encoder.parameters()).device
        return keyed_generator(device, self.settings.seed, purpose, step, distributed.rank())

    def _in_format(self, x: Tensor) -> Tensor:
        """Images in the memory format of the settings."""
        return channels_last(x) if self.settings.channels_last else x

    def _autocast(self, device: torch.device) -> torch.autocast:
        return autocast(device, self.settings.precision)


class ViewStep(PretrainStep):
    """A step that encodes random views of the images, `self.view` (`pretrain.views`)."""

    def __init__(
        self, model: EncoderModel, auxiliary: nn.Module, settings: TrainSettings, pretrain: PretrainSettings
    ) -> None:
        super().__init__(model, auxiliary, settings, pretrain)
        self.view = build_view(pretrain, model)
