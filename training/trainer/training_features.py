"""Features of the training images, as meta-training on frozen features and the fit of their scaling need them.

Notation: n images of feature size F.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.records import Rows
from metagmvae.training.augment.build_view import keyed_view
from metagmvae.training.methods.frozen_features import CHUNK
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel


def training_features(
    model: EncoderModel,
    settings: Settings,
    images: Rows,
    device: torch.device,
    view: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Raw features of images, or of a view of them, in the precision of the training: float32 (n, F)."""
    return encode_images(
        model,
        images,
        device,
        CHUNK,
        raw=True,
        view=view,
        channels_last=settings.train.channels_last,
        precision=settings.train.precision,
        to=torch.device("cpu"),
    ).numpy()


def view_features(
    model: EncoderModel, settings: Settings, images: Rows, device: torch.device, count: int
) -> np.ndarray:
    """Raw features of one random view of each of the first images, float32 (count, F).

    The views are those of the pre-training, and depend on `train.seed` alone.
    """
    view = keyed_view(settings, model, "scaling")
    return training_features(model, settings, images[np.arange(count)], device, view)
