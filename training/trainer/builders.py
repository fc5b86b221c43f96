"""Settings -> model, views, optimiser, schedule: the one place in `training` that unpacks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from metagmvae.configs.schema import ModelSettings, PretrainSettings, TrainSettings
from metagmvae.training.augment.photos import photo_view
from metagmvae.training.augment.strokes import stroke_view
from metagmvae.training.models.encoders import EncoderModel, build_encoder
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.models.multi_crop import MultiCropEncoder
from metagmvae.training.trainer.lars import Lars

View = Callable[[Tensor, torch.Generator], Tensor]


def build_model(settings: ModelSettings, image_shape: tuple[int, int, int], seed: int) -> MetaGMVAE:
    """A freshly initialised model; a function of the settings and the seed, not of global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MetaGMVAE(
            image_shape,
            encoder=settings.encoder,
            image_size=settings.image_size,
            rectified=settings.rectified,
            average=settings.average,
            reconstruct=settings.reconstruct,
            features=settings.features,
            variance=settings.variance,
            latent=settings.latent,
            channels=settings.channels,
            width=settings.width,
            heads=settings.heads,
            layers=settings.layers,
            attention_scale=settings.attention_scale,
            attention_block=settings.attention_block,
            attention_activation=settings.attention_activation,
            posterior=settings.posterior,
        )


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam with coupled weight decay, as the paper's experiments use it (row 8)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def build_encoder_model(settings: ModelSettings, image_shape: tuple[int, int, int], seed: int) -> EncoderModel:
    """A freshly initialised encoder by itself: the one that `build_model` would begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(
            settings.encoder,
            image_shape,
            settings.channels,
            settings.image_size,
            settings.rectified,
            settings.average,
        )
        return EncoderModel(encoder, image_shape)


def build_view(settings: PretrainSettings, model: EncoderModel) -> View:
    """What makes a random view of each image for a model's encoder: (n, C, H, W) in [0, 1], generator -> its size."""
    of_strokes = model.image_shape[0] == 1 if settings.views == "auto" else settings.views == "strokes"
    if of_strokes:
        return partial(stroke_view, elastic=settings.elastic)
    side = model.encoder.size[-1] if isinstance(model.encoder, MultiCropEncoder) else model.image_shape[-1]
    return partial(photo_view, size=side, least=settings.crop_area)


def build_pretrain_optimizer(modules: Sequence[nn.Module], settings: PretrainSettings) -> torch.optim.Optimizer:
    """AdamW, Adam (the paper's) or LARS (SimCLR's, for large batches) over encoder and projector."""
    parameters = [p for module in modules for p in module.parameters()]
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "lars": Lars}
    kind = kinds[settings.optimizer]
    return kind(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def build_schedule(optimizer: torch.optim.Optimizer, kind: str, steps: int, per_epoch: int = 1) -> LambdaLR:
    """Factors on the learning rate by step.

    `constant`; `cosine` to zero; `one-cycle`, up for 30% of the steps and down for the rest; `published-code`, constant
    for 10 epochs, then a cosine over the epochs, down to zero within 75 and up again in the next 75 (row 7).

    Args:
        optimizer: whose rates are changed.
        kind: see above.
        steps: of the stage.
        per_epoch: steps of an epoch.
    """

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        if kind == "constant":
            return 1.0
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if kind == "published-code":
            return 0.5 * (1 + math.cos(math.pi * max(step // per_epoch - 10, 0) / 75))
        rising = 0.3
        if done < rising:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / rising))
        return 0.5 * (1 + math.cos(math.pi * (done - rising) / (1 - rising)))

    return LambdaLR(optimizer, factor)
