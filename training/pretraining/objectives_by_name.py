"""The objectives of pre-training by the value of `pretrain.objective`, those that other packages add included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metagmvae.configs.schema import PretrainSettings, Settings
from metagmvae.configs.suggestions import suggestion
from metagmvae.pipelines.extensions import check_options, extension_names, load_extension
from metagmvae.pipelines.records import DataError
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


def find_objective(settings: PretrainSettings) -> type[PretrainStep]:
    """Return the step class of the objective of the settings.

    Raises:
        DataError: there is no such objective or option, or its package cannot be used.
    """
    name, options = settings.objective, settings.options
    step: Any = OBJECTIVES.get(name) or load_extension("metagmvae.objectives", name)
    if step is None:
        known = [*OBJECTIVES, *extension_names("metagmvae.objectives")]
        raise DataError(f"pretrain.objective ({name}): no such objective{suggestion(name, known)}")
    if not (isinstance(step, type) and issubclass(step, PretrainStep)):
        raise DataError(f"pretrain.objective ({name}): its package adds {step!r} instead of a subclass of PretrainStep")
    check_options("pretrain.options", options, name, None if name in OBJECTIVES else step)
    return step


def build_auxiliary(model: EncoderModel, settings: Settings, images: int) -> nn.Module:
    """The auxiliary module of the objective, a function of model, settings and seed.

    Args:
        model: the model whose encoder is trained.
        settings: of the run.
        images: number of training images.

    Raises:
        DataError: there are too few images for these settings.
    """
    objective = find_objective(settings.pretrain)
    if settings.pretrain.steps:
        objective.check_images(settings, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        return objective.build_auxiliary(model, settings, images)


def build_pretrain_step(model: EncoderModel, auxiliary: nn.Module, settings: Settings) -> PretrainStep:
    """The step module of the objective."""
    step = find_objective(settings.pretrain)
    return step(model, auxiliary, settings.train, settings.pretrain, **settings.pretrain.options)
