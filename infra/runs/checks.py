"""Checks of settings against the data set, before any work is done."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import Settings
from metagmvae.pipelines.shards.dataset import Dataset

if TYPE_CHECKING:
    import torch

    from metagmvae.training.trainer.stages import ModelKind


ENCODER_KEYS = ("encoder", "image_size", "channels", "rectified", "average")
"""Keys of [model] that say what the encoder is."""


def device_of(settings: Settings) -> torch.device:
    """The device that the settings ask for.

    Raises:
        SettingsError: CUDA was asked for, and there is none.
    """
    import torch

    wanted = settings.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SettingsError('run.device = "cuda": this machine has no CUDA device; set it to "auto" or "cpu"')
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def with_encoder_of(settings: Settings, dataset: Dataset) -> Settings:
    """Settings with the encoder that made the features of the data set, where it holds features.

    Raises:
        SettingsError: the settings ask for another encoder.
    """
    if dataset.kind != "features":
        return settings
    from metagmvae.evaluation.fewshot.encoding import load_dataset_encoder

    made_by = load_dataset_encoder(dataset).settings.model
    for key in ENCODER_KEYS:
        wanted, found = getattr(settings.model, key), getattr(made_by, key)
        if wanted not in (found, type(settings.model).model_fields[key].default):
            raise SettingsError(
                f"model.{key} is {wanted!r}, and the features of {dataset.uri} were made with {found!r}: leave it out, "
                "or write features with another encoder"
            )
    update = {key: getattr(made_by, key) for key in ENCODER_KEYS}
    return settings.model_copy(update={"model": settings.model.model_copy(update=update)})


def check_data(settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """Refuse before any work what would fail after an hour of it: splits, encoder, way and shot of validation."""
    dataset.split(settings.data.train_split)
    check_encoder(settings, dataset, kind)
    if settings.data.reader != "stream":
        dataset.rows(settings.data.train_split, "mmap", check=False)
    if settings.validation.every:
        from metagmvae.pipelines.sampling.episodes import EpisodeSampler

        labels = dataset.labels(settings.data.validation_split)
        wanted = settings.validation
        for shot in wanted.shots:
            EpisodeSampler(labels, way=wanted.way, shot=shot, query=wanted.query, seed=wanted.seed)


def check_encoder(settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """Refuse settings whose encoder does not go with the data or with what is trained.

    Raises:
        SettingsError: naming the key.
    """
    on_features = settings.model.reconstruct == "features"
    if kind == "encoder" and dataset.kind == "features":
        raise SettingsError(f"data.uri: {dataset.uri} holds features; an encoder is trained on images")
    if kind == "encoder" and not settings.pretrain.steps:
        raise SettingsError("pretrain.steps is 0: set it to the steps that the encoder is trained for")
    if kind == "encoder":
        if settings.validation.every and settings.validation.probes and find_spec("faiss") is None:
            raise SettingsError(
                "validation.probes need faiss: pip install 'metagmvae[cpu]' ([gpu] where there is a GPU), or set "
                "validation.probes to false"
            )
        return
    if dataset.kind == "features" and not on_features:
        raise SettingsError(f'model.reconstruct is "pixels", and {dataset.uri} holds features: set it to "features"')
    if dataset.kind == "features" and settings.pretrain.steps:
        raise SettingsError(
            f"pretrain.steps is {settings.pretrain.steps}, and {dataset.uri} holds features of a trained encoder: set "
            "it to 0"
        )
    if dataset.kind == "images" and on_features and not settings.pretrain.steps:
        raise SettingsError(
            f'model.reconstruct ("features") needs a trained encoder, and {dataset.uri} holds images: set '
            "pretrain.steps above 0, or train on what `metagmvae features` writes"
        )
