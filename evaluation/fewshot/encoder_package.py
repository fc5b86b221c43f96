"""The encoder of a model as a package of its own, and the feature data sets that are written with it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metagmvae.configs.load import fingerprint
from metagmvae.configs.schema import Average, ModelSettings, Settings
from metagmvae.evaluation.fewshot.encoding import check_encoder
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.feature_source import FeatureSource, open_features
from metagmvae.pipelines.vectors import VECTORS
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel, configured_encoder, encoder_digest
from metagmvae.training.trainer.builders import build_encoder_model
from metagmvae.training.trainer.package import CARD, WEIGHTS, LoadedModel, load_package, save_package

ENCODER_FOLDER = "encoder"
"""Folder inside a feature data set that holds the package of the encoder."""


def load_dataset_encoder(dataset: Dataset) -> LoadedModel:
    """Load the encoder that made the features of a data set, from the package inside the data set.

    That of a dataset of vectors returns them as they are, and needs no package.

    Raises:
        DataError: the package is missing or was altered, or its encoder is not the one named in the manifest.
    """
    if dataset.content == VECTORS:
        # Vectors have both signs, unlike the output of a final ReLU.
        settings = Settings(name=VECTORS, model=ModelSettings(encoder=VECTORS, rectified=False))
        model = build_encoder_model(settings.model, dataset.image_shape, seed=0)
        check_encoder(model, dataset)
        return LoadedModel(model.eval(), settings, dataset.image_shape, {})
    card = dataset.attachment(f"{ENCODER_FOLDER}/{CARD}")
    dataset.attachment(f"{ENCODER_FOLDER}/{WEIGHTS}")
    loaded = load_package(card.parent)
    check_encoder(loaded.model, dataset)
    return loaded


def encoder_origin(loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    """Return the sha256 of the encoder of a model and how it was trained, as plain values.

    `trained` is None if that is not recorded: the model was trained on stored features, and `dataset` is not these
    features.
    """
    if dataset.kind == "features":
        encoder = load_dataset_encoder(dataset)
        info, settings, by = encoder.info, encoder.settings, "a run of its own"
    else:
        info, settings, by = loaded.info, loaded.settings, "the run of the model"
    digest = encoder_digest(loaded.model.encoder)
    if "weights" in info:
        return {"sha256": digest, "trained": {"by": "its publisher", "weights": info["weights"]}}
    if dataset.content == VECTORS or (not settings.pretrain.steps and settings.model.reconstruct == "features"):
        return {"sha256": digest, "trained": None}
    pretrained = {"pretrain": settings.pretrain.model_dump(mode="json")} if settings.pretrain.steps else {}
    trained = {
        "by": by,
        "steps": settings.pretrain.steps or info.get("step"),
        "data_fingerprint": info.get("data_fingerprint"),
        "settings_fingerprint": fingerprint(settings),
        "seed": settings.train.seed,
        "selected_by": info.get("selected_by") if dataset.kind == "features" else None,
    }
    return {"sha256": digest, "trained": trained | pretrained}


@dataclass(frozen=True)
class PackagedEncoder:
    """An encoder as the bytes of its package files, so that it can be sent to workers on other machines."""

    files: tuple[tuple[str, bytes], ...]
    """(name, content) of each file."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encode images: uint8 (n, C, H, W) -> float32 (n, F)."""
        model, device = _unpack(self)
        return encode_images(model, images, device).float().cpu().numpy()


@lru_cache(maxsize=1)
def _unpack(packaged: PackagedEncoder) -> tuple[EncoderModel, torch.device]:
    """Load the encoder once per process, on a GPU if the process has one."""
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in packaged.files:
            (Path(folder) / name).write_bytes(content)
        return load_package(folder).model.to(device), device


@contextmanager
def feature_source(loaded: LoadedModel, dataset: Dataset, dtype: str) -> Iterator[FeatureSource]:
    """Yield the features of a data set as a source that `write_dataset` can write; valid inside the context.

    Args:
        loaded: the model whose encoder computes the features.
        dataset: images.
        dtype: of the stored features, `float16` or `float32`.

    Raises:
        DataError: the images have another shape than the encoder takes, the data set holds features, or the
            network of the method is no encoder of single images.
    """
    if loaded.model.takes_vectors or dataset.content == VECTORS:
        raise DataError(f"{dataset.uri}: vectors are features already, and no encoder reads them; train on the dataset")
    if dataset.kind == "images" and dataset.image_shape != loaded.image_shape:
        channels, size = loaded.image_shape[0], loaded.image_shape[-1]
        raise DataError(
            f"{dataset.uri}: images are {dataset.image_shape} and the encoder takes {loaded.image_shape}; prepare them "
            f"with --size {size} --channels {channels}"
        )
    encoder = encoder_only(loaded)
    new = build_encoder_model(encoder.settings.model, loaded.image_shape, seed=0)
    if encoder.model.state_dict().keys() != new.state_dict().keys():
        raise DataError(
            f"the encoder of a model of {loaded.settings.method.name} has no statistics of batch normalisation, so it "
            "gives no features of single images; use an encoder of pre-training or of another method"
        )
    with tempfile.TemporaryDirectory() as folder:
        package = save_package(Path(folder) / ENCODER_FOLDER, encoder)
        settings = encoder.settings.model
        description = {
            "sha256": encoder_digest(encoder.model.encoder),
            "encoder": settings.encoder,
            "image_size": settings.image_size,
            "rectified": settings.rectified,
            "average": settings.average,
        }
        if settings.normalise != "none":  # without it the description is that of older versions
            description["normalise"] = settings.normalise
        yield open_features(
            dataset,
            PackagedEncoder(tuple((name, (package / name).read_bytes()) for name in (CARD, WEIGHTS))),
            feature_size=encoder.model.feature_dim,
            encoder=description,
            attachments={f"{ENCODER_FOLDER}/{name}": package / name for name in (CARD, WEIGHTS)},
            dtype=dtype,
        )


def encoder_only(loaded: LoadedModel) -> LoadedModel:
    """Return the encoder of a model as an encoder-only model; the weights are shared."""
    return replace(loaded, model=EncoderModel(loaded.model.encoder, loaded.image_shape))


def with_average(loaded: LoadedModel, average: Average) -> LoadedModel:
    """Return a model whose features are averaged over other views (`model.average`) than it was trained with.

    It has no calibration: that of the model was fitted to its own features.
    """
    settings = loaded.settings.model_copy(
        update={"model": loaded.settings.model.model_copy(update={"average": average})}
    )
    encoder = configured_encoder(settings.model, loaded.image_shape)
    encoder.load_state_dict(loaded.model.encoder.state_dict())
    model = copy.deepcopy(loaded.model)
    model.encoder = encoder
    model = model.to(memory_format=torch.channels_last).eval()
    return replace(loaded, model=model, settings=settings, calibration=None)
