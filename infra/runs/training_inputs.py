"""What a training reads: its settings, its dataset and, for a dataset of features, the encoder that made them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import DataSettings, Settings
from metagmvae.evaluation.fewshot.encoder_package import load_dataset_encoder
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.vectors import VECTORS
from metagmvae.training.device.default import default_device
from metagmvae.training.trainer.package import LoadedModel

LOG = logging.getLogger(__name__)
ENCODER_KEYS = ("encoder", "image_size", "channels", "rectified", "average", "normalise", "options")
"""Keys of [model] that define the encoder."""


@dataclass(frozen=True)
class TrainingInputs:
    """Opened once per process and passed to everything that needs a part of it."""

    settings: Settings
    """For a dataset of features, [model] holds the settings of the encoder that made them."""
    dataset: Dataset
    encoder: LoadedModel | None
    """The encoder that made the features; None for a dataset of images."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, also of those that the features were made from."""
        return self.encoder.image_shape if self.encoder else self.dataset.image_shape


def load_inputs(settings: Settings, dataset: Dataset) -> TrainingInputs:
    """Load the encoder of a dataset of features and copy its settings into [model]; see also `without_validation`.

    Raises:
        SettingsError: the settings name another encoder.
        DataError: the encoder is missing or damaged.
    """
    settings = without_validation(settings, dataset)
    if dataset.kind != "features":
        return TrainingInputs(settings, dataset, None)
    if settings.model.features == "view-whitened" and settings.model.reconstruct == "features":
        to_images = "" if dataset.content == VECTORS else "data.uri to the images, or "
        raise SettingsError(
            f'model.features is "view-whitened", which encodes views of the training images, and {dataset.uri} holds '
            f'{dataset.content}: set {to_images}model.features to "whitened"'
        )
    encoder = load_dataset_encoder(dataset)
    for key in ENCODER_KEYS:
        requested, actual = getattr(settings.model, key), getattr(encoder.settings.model, key)
        if requested not in (actual, type(settings.model).model_fields[key].default):
            if dataset.content == VECTORS:
                raise SettingsError(
                    f"model.{key} is {requested!r}, but {dataset.uri} holds vectors, which no encoder reads: remove "
                    "the key, or use the preset vectors"
                )
            raise SettingsError(
                f"model.{key} is {requested!r}, but the features of {dataset.uri} were made with {actual!r}: remove "
                "the key, or write features with another encoder"
            )
    update = {key: getattr(encoder.settings.model, key) for key in ENCODER_KEYS}
    model = settings.model.model_copy(update=update)
    return TrainingInputs(settings.model_copy(update={"model": model}), dataset, encoder)


def has_samples(dataset: Dataset, split: str) -> bool:
    """Whether a dataset has a split that is not empty."""
    return split in dataset.splits and dataset.split(split)["samples"] > 0


def without_validation(settings: Settings, dataset: Dataset) -> Settings:
    """Switch validation off, with a warning, where the dataset has no validation split of the usual name.

    Then the last model is kept. A split that the settings name differently is required.
    """
    split = settings.data.validation_split
    usual = DataSettings.model_fields["validation_split"].default
    if not settings.validation.every or has_samples(dataset, split) or split != usual:
        return settings
    LOG.warning(
        "%s: has no split %r; training goes on without validation, and the last model is kept", dataset.uri, split
    )
    changes = {
        "validation": settings.validation.model_copy(update={"every": 0}),
        "train": settings.train.model_copy(update={"selection": "last"}),
    }
    return settings.model_copy(update=changes)


def select_device(settings: Settings) -> torch.device:
    """Return the device of `run.device`; "auto" is CUDA where it is available.

    Raises:
        SettingsError: `run.device` is "cuda" and CUDA is not available.
    """
    device = torch.device("cpu") if settings.run.device == "cpu" else default_device()
    if settings.run.device == "cuda" and device.type != "cuda":
        raise SettingsError('run.device = "cuda": this machine has no CUDA device; set it to "auto" or "cpu"')
    return device
