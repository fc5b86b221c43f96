"""Checks of the settings against the dataset, made before a run starts."""

from __future__ import annotations

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import Settings
from metagmvae.infra.runs.training_inputs import TrainingInputs
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.stages import ModelKind


def check_settings(settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """Check splits, shards, encoder, and way and shots of the validation, so that no run fails after an hour.

    Raises:
        SettingsError: the settings do not fit the dataset.
        DataError: a split is missing, a shard is damaged, or a class has too few images.
    """
    dataset.split(settings.data.train_split)
    if kind == "meta-gmvae" and not settings.train.steps:
        raise SettingsError("train.steps is 0: set it to the number of meta-training steps, or use metagmvae pretrain")
    check_encoder_settings(settings, dataset, kind)
    if settings.data.reader != "stream":
        dataset.rows(settings.data.train_split, "mmap", check=False)
    validation = settings.validation
    if validation.every:
        labels = dataset.labels(settings.data.validation_split)
        for shot in validation.shots:
            EpisodeSampler(labels, way=validation.way, shot=shot, query=validation.query, seed=validation.seed)


def check_model(inputs: TrainingInputs, kind: ModelKind) -> None:
    """Build the model once, so that a wrong encoder or image size is found before the run folder is claimed.

    Raises:
        EncoderError: there is no such encoder, or it does not accept such images.
    """
    build = build_model if kind == "meta-gmvae" else build_encoder_model
    build(inputs.settings.model, inputs.image_shape, seed=0)


def check_encoder_settings(settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """Check that the encoder of the settings fits the dataset and what is trained.

    Raises:
        SettingsError: naming the key.
    """
    if kind == "encoder":
        _check_encoder_training(settings, dataset)
    elif dataset.kind == "features" and settings.model.reconstruct != "features":
        raise SettingsError(f'model.reconstruct is "pixels", but {dataset.uri} holds features: set it to "features"')
    elif dataset.kind == "features" and settings.pretrain.steps:
        raise SettingsError(
            f"pretrain.steps is {settings.pretrain.steps}, but {dataset.uri} holds features of a trained encoder: set "
            "it to 0"
        )
    elif dataset.kind == "images" and settings.model.reconstruct == "features" and not settings.pretrain.steps:
        raise SettingsError(
            f'model.reconstruct = "features" needs a trained encoder, but {dataset.uri} holds images: set '
            "pretrain.steps above 0, or train on the output of `metagmvae features`"
        )


def _check_encoder_training(settings: Settings, dataset: Dataset) -> None:
    """Check the settings of `metagmvae pretrain`, which trains an encoder only."""
    if dataset.kind == "features":
        raise SettingsError(f"data.uri: {dataset.uri} holds features; an encoder is trained on images")
    if not settings.pretrain.steps:
        raise SettingsError("pretrain.steps is 0: set it to the number of pre-training steps")
