"""Features of a data set for one model: encoded now, or read where they were written by the same encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import Average
from metagmvae.evaluation.fewshot.predict import encode_images
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset, Reader
from metagmvae.pipelines.shards.feature_source import FeatureSource, open_features
from metagmvae.training.models.encoders import EncoderModel, encoder_digest
from metagmvae.training.models.multi_crop import with_average
from metagmvae.training.trainer.package import CARD, WEIGHTS, LoadedModel, load_package, save_package

ROWS = 4096
FOLDER = "encoder"
"""Of a data set of features: the package of the encoder that made them."""


@torch.inference_mode()
def encode_split(
    model: EncoderModel,
    dataset: Dataset,
    split: str,
    device: torch.device,
    reader: Reader = "auto",
    memory_limit_mb: int = 4096,
) -> Tensor:
    """Features of a split as the model works on them: (n, F) on the device.

    Raises:
        DataError: the images have another shape, or the features were made by another encoder.
    """
    if dataset.image_shape != model.image_shape:
        raise DataError(f"{dataset.uri}: images are {dataset.image_shape} and the model takes {model.image_shape}")
    if dataset.kind == "images":
        return encode_images(model, dataset.images(split, reader, memory_limit_mb), device)
    check_encoder(model, dataset)
    raw = dataset.rows(split, reader, memory_limit_mb)
    pieces = [np.asarray(raw[np.arange(first, min(first + ROWS, len(raw)))]) for first in range(0, len(raw), ROWS)]
    model.eval()
    return scale_features(model, torch.cat([torch.from_numpy(h).float().to(device) for h in pieces]))


@torch.inference_mode()
def scale_features(model: EncoderModel, raw_nF: Tensor) -> Tensor:
    """Features as the encoder gives them at the scale that the model works on: (n, F) -> (n, F)."""
    return torch.cat([model.scale_features(h) for h in raw_nF.split(ROWS)])


def check_encoder(model: EncoderModel, dataset: Dataset) -> None:
    """Whether a model's encoder made the features of a data set.

    Raises:
        DataError: it was another one.
    """
    made_by, ours = dataset.manifest["encoder"]["sha256"], encoder_digest(model.encoder)
    if made_by != ours:
        raise DataError(
            f"{dataset.uri}: its features are of encoder {made_by[:12]}…, and the model's is {ours[:12]}…; write them "
            "with the model's: metagmvae features MODEL"
        )


def load_dataset_encoder(dataset: Dataset) -> LoadedModel:
    """The encoder that made the features of a data set, which carries it.

    Raises:
        DataError: it is missing, was altered, or is not the one that the manifest names.
    """
    card = dataset.attachment(f"{FOLDER}/{CARD}")
    dataset.attachment(f"{FOLDER}/{WEIGHTS}")
    loaded = load_package(card.parent)
    check_encoder(loaded.model, dataset)
    return loaded


@dataclass(frozen=True)
class PackagedEncoder:
    """An encoder that travels to workers, which may be on other machines, as the files of its package."""

    files: tuple[tuple[str, bytes], ...]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, C, H, W) -> float32 (n, F)."""
        model, device = _loaded(self)
        return encode_images(model, images, device).float().cpu().numpy()


@lru_cache(maxsize=1)
def _loaded(packaged: PackagedEncoder) -> tuple[EncoderModel, torch.device]:
    """Loaded once per process, onto a GPU where the process has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in packaged.files:
            (Path(folder) / name).write_bytes(content)
        return load_package(folder).model.to(device), device


@contextmanager
def feature_source(loaded: LoadedModel, dataset: Dataset, dtype: str) -> Iterator[FeatureSource]:
    """Features of a data set by a model's encoder, ready to be written while the context lasts.

    Raises:
        DataError: the images have another shape than the encoder takes.
    """
    if dataset.kind == "images" and dataset.image_shape != loaded.image_shape:
        raise DataError(f"{dataset.uri}: images are {dataset.image_shape} and the encoder takes {loaded.image_shape}")
    alone = load_encoder(loaded)
    with tempfile.TemporaryDirectory() as folder:
        package = save_package(Path(folder) / FOLDER, alone)
        settings = alone.settings.model
        about = {
            "sha256": encoder_digest(alone.model.encoder),
            "encoder": settings.encoder,
            "image_size": settings.image_size,
            "rectified": settings.rectified,
            "average": settings.average,
        }
        yield open_features(
            dataset,
            PackagedEncoder(tuple((name, (package / name).read_bytes()) for name in (CARD, WEIGHTS))),
            feature_size=alone.model.features,
            encoder=about,
            attachments={f"{FOLDER}/{name}": package / name for name in (CARD, WEIGHTS)},
            dtype=dtype,
        )


def load_encoder(loaded: LoadedModel) -> LoadedModel:
    """The encoder of any model of ours."""
    return replace(loaded, model=EncoderModel(loaded.model.encoder, loaded.image_shape))


def with_encoder_average(loaded: LoadedModel, average: Average) -> LoadedModel:
    """The encoder of any model of ours, its features the mean over other views of an image than it was set to."""
    encoder = with_average(loaded.model.encoder, loaded.image_shape[1:], average).eval()
    settings = loaded.settings.model_copy(
        update={"model": loaded.settings.model.model_copy(update={"average": average})}
    )
    return replace(loaded, model=EncoderModel(encoder, loaded.image_shape), settings=settings)
