"""Builds models, views, optimisers and learning-rate schedules from the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings, PretrainSettings, TrainSettings
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models.encoders import EncoderModel, configured_encoder
from metagmvae.training.models.meta_learner import MetaLearner
from metagmvae.training.trainer.lars import Lars

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "lars": Lars,
    "sgd": torch.optim.SGD,
}


def build_model(
    settings: ModelSettings, image_shape: tuple[int, int, int], seed: int, method: MethodSettings | None = None
) -> MetaLearner:
    """A newly initialised model; a function of the settings and the seed, not of the global random state.

    Args:
        settings: of the networks.
        image_shape: (C, H, W) of the images.
        seed: of the initialisation.
        method: of the method; None: Meta-GMVAE.

    Raises:
        DataError: there is no such method.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = method or MethodSettings()
        return find_method(method).build(settings, method, image_shape)


def build_encoder_model(settings: ModelSettings, image_shape: tuple[int, int, int], seed: int) -> EncoderModel:
    """A newly initialised encoder without the rest of the model; the same weights as the encoder of `build_model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EncoderModel(configured_encoder(settings, image_shape), image_shape)


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam for meta-training, with coupled weight decay as in the published code (the paper mentions none)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def build_pretrain_optimizer(modules: Sequence[nn.Module], settings: PretrainSettings) -> torch.optim.Optimizer:
    """Optimiser of the trained parameters of encoder and auxiliary module."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    own: dict[str, dict[str, Any]] = {"lars": {}, "sgd": {"momentum": settings.beta1}}
    options = own.get(settings.optimizer, {"betas": (settings.beta1, 0.999)})
    return OPTIMIZERS[settings.optimizer](  # type: ignore[call-arg]
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, **options
    )


def build_schedule(optimizer: torch.optim.Optimizer, kind: str, steps: int, steps_per_epoch: int = 1) -> LambdaLR:
    """Learning-rate schedule, stepped once per training step.

    Args:
        optimizer: whose learning rates are scheduled.
        kind: `constant`; `cosine`, to zero; `one-cycle`, from 4% up during 30% of the steps, then down to zero;
            `published-code`, SimCLR of the published code: constant for 10 epochs, then a cosine with a half-period of
            75 epochs.
        steps: length of the stage.
        steps_per_epoch: for `published-code`.
    """

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        if kind == "constant":
            return 1.0
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if kind == "published-code":
            return 0.5 * (1 + math.cos(math.pi * max(step // steps_per_epoch - 10, 0) / 75))
        rising = 0.3
        if done < rising:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / rising))
        return 0.5 * (1 + math.cos(math.pi * (done - rising) / (1 - rising)))

    return LambdaLR(optimizer, factor)
