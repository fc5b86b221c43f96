"""The random augmentation that the settings choose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.configs.training_settings import PretrainSettings
from metagmvae.training.augment.photos import photo_view
from metagmvae.training.augment.strokes import stroke_view
from metagmvae.training.augment.view import View
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.multi_crop import MultiCropEncoder


def build_view(settings: PretrainSettings, model: EncoderModel) -> View:
    """The random augmentation of the settings, at the input size of the model's encoder."""
    on_strokes = model.image_shape[0] == 1 if settings.views == "auto" else settings.views == "strokes"
    if on_strokes:
        return partial(stroke_view, elastic=settings.elastic)
    size = model.encoder.size[-1] if isinstance(model.encoder, MultiCropEncoder) else model.image_shape[-1]
    return partial(photo_view, size=size, min_area=settings.crop_area, crops=settings.crops)


def keyed_view(settings: Settings, model: EncoderModel, purpose: str) -> Callable[[Tensor], Tensor]:
    """The same augmentation with random numbers that are a function of `train.seed` and the purpose alone."""
    view = build_view(settings.pretrain, model)
    generator = keyed_generator(torch.device("cpu"), settings.train.seed, purpose)
    return lambda images: view(images, generator)
