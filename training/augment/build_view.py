"""The random augmentation that the settings choose."""

from __future__ import annotations

from functools import partial

from metagmvae.configs.training_settings import PretrainSettings
from metagmvae.training.augment.photos import photo_view
from metagmvae.training.augment.strokes import stroke_view
from metagmvae.training.augment.view import View
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.multi_crop import MultiCropEncoder


def build_view(settings: PretrainSettings, model: EncoderModel) -> View:
    """The random augmentation of the settings, at the input size of the model's encoder."""
    on_strokes = model.image_shape[0] == 1 if settings.views == "auto" else settings.views == "strokes"
    if on_strokes:
        return partial(stroke_view, elastic=settings.elastic)
    size = model.encoder.size[-1] if isinstance(model.encoder, MultiCropEncoder) else model.image_shape[-1]
    return partial(photo_view, size=size, min_area=settings.crop_area, crops=settings.crops)
