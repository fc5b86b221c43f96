"""The objectives of pre-training by the value of `pretrain.objective`."""

from __future__ import annotations

import torch
from torch import nn

from metagmvae.configs.schema import Settings
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.pretraining.acai import AcaiStep
from metagmvae.training.pretraining.bigan import BiganStep
from metagmvae.training.pretraining.contrastive import ContrastiveStep
from metagmvae.training.pretraining.deepcluster import DeepClusterStep
from metagmvae.training.pretraining.psco import PscoStep
from metagmvae.training.pretraining.step import PretrainStep

OBJECTIVES: dict[str, type[PretrainStep]] = {
    "nt-xent": ContrastiveStep,
    "prototypes": ContrastiveStep,
    "acai": AcaiStep,
    "bigan": BiganStep,
    "deepcluster": DeepClusterStep,
    "psco": PscoStep,
}


def build_auxiliary(model: EncoderModel, settings: Settings, images: int) -> nn.Module:
    """The auxiliary module of the objective, a function of model, settings and seed.

    Args:
        model: the model whose encoder is trained.
        settings: of the run.
        images: number of training images.

    Raises:
        DataError: there are too few images for these settings.
    """
    objective = OBJECTIVES[settings.pretrain.objective]
    if settings.pretrain.steps:
        objective.check_images(settings, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        return objective.build_auxiliary(model, settings, images)


def build_pretrain_step(model: EncoderModel, auxiliary: nn.Module, settings: Settings) -> PretrainStep:
    """The step module of the objective."""
    return OBJECTIVES[settings.pretrain.objective](model, auxiliary, settings.train, settings.pretrain)
