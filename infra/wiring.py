"""The composition root of training: settings -> data, encoder, device, validation, training in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from configs.load import SettingsError
from configs.schema import Settings
from pipelines.dataset import Dataset, Reader
from pipelines.tar_stream import StreamedImages

if TYPE_CHECKING:
    import torch

    from training.hooks import Surroundings, Validate
    from training.run import Kind

ENCODER_KEYS = ("encoder", "image_size", "channels", "rectified", "average")
"""Keys of [model] that say what the encoder is."""
SETTINGS = "settings.json"
RECORD = "run.json"


def train_here(settings: Settings, dataset: Dataset, surroundings: Surroundings, kind: Kind) -> None:
    """Train in this process, as the only one or as one of several ranks."""
    import torch

    from training.allocator import keep_freed_memory
    from training.run import train

    if surroundings.device.type == "cpu":
        keep_freed_memory()
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    data = _images(settings, dataset, settings.data.train_split)
    # On every rank: it is called on rank 0 only, but all ranks must know when the others wait for it.
    validate = validation(settings, dataset, surroundings.device) if settings.validation.every else None
    image_shape, encoder = dataset.image_shape, None
    if dataset.kind == "features":
        from evaluation.features import encoder_of

        carried = encoder_of(dataset)
        image_shape, encoder = carried.image_shape, carried.model.encoder.state_dict()
    fingerprint = dataset.fingerprint
    train(settings, data, image_shape, fingerprint, surroundings, validate, kind=kind, encoder=encoder)


def _images(settings: Settings, dataset: Dataset, split: str) -> Any:
    data = settings.data
    if data.reader == "stream":
        return StreamedImages(dataset, split, data.shuffle_buffer)
    return dataset.rows(split, _by_row(settings), data.memory_limit_mb)


def _by_row(settings: Settings) -> Reader:
    """The reader where rows are asked for by number on the host: judging, and what goes to the device at once."""
    reader = settings.data.reader
    return "mmap" if reader == "stream" or reader == "device" else reader


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
    from evaluation.features import encoder_of

    made_by = encoder_of(dataset).settings.model
    for key in ENCODER_KEYS:
        wanted, found = getattr(settings.model, key), getattr(made_by, key)
        if wanted not in (found, type(settings.model).model_fields[key].default):
            raise SettingsError(
                f"model.{key} is {wanted!r}, and the features of {dataset.uri} were made with {found!r}: leave it out, "
                "or write features with another encoder"
            )
    update = {key: getattr(made_by, key) for key in ENCODER_KEYS}
    return settings.model_copy(update={"model": settings.model.model_copy(update=update)})


def check_data(settings: Settings, dataset: Dataset, kind: Kind) -> None:
    """Refuse before any work what would fail after an hour of it: splits, encoder, way and shot of validation."""
    dataset.split(settings.data.train_split)
    check_encoder(settings, dataset, kind)
    if settings.data.reader != "stream":
        dataset.rows(settings.data.train_split, "mmap", check=False)
    if settings.validation.every:
        from pipelines.episodes import EpisodeSampler

        labels = dataset.labels(settings.data.validation_split)
        wanted = settings.validation
        for shot in wanted.shots:
            EpisodeSampler(labels, way=wanted.way, shot=shot, query=wanted.query, seed=wanted.seed)


def check_encoder(settings: Settings, dataset: Dataset, kind: Kind) -> None:
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


def validation(settings: Settings, dataset: Dataset, device: torch.device) -> Validate:
    """Judge a model on validation episodes: every image encoded once, then every shot."""
    from evaluation.features import features_of
    from evaluation.validate import judge

    split = settings.data.validation_split

    def validate(model: Any) -> Mapping[str, Mapping[str, float]]:
        h_nF = features_of(model, dataset, split, device, _by_row(settings), settings.data.memory_limit_mb)
        return judge(model, settings, h_nF, dataset.labels(split))

    return validate


def cluster_address(settings: Settings) -> str:
    """The Ray cluster to join: the setting, RAY_ADDRESS, or none (one is started on this machine)."""
    return settings.run.address or os.environ.get("RAY_ADDRESS", "")
