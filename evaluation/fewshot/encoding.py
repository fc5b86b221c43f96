"""Features of a split of a data set for one model: n images, F features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset, Reader
from metagmvae.pipelines.vectors import VECTORS, describe_shape, image_remedy
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel, encoder_digest
from metagmvae.training.models.meta_learner import MetaLearner

FEATURE_ROWS = 4096
"""Rows of stored features that are read and scaled at once."""


@torch.inference_mode()
def encode_split(
    model: EncoderModel,
    dataset: Dataset,
    split: str,
    device: torch.device,
    reader: Reader = "auto",
    memory_limit_mb: int = 4096,
) -> Tensor:
    """Return what `model.encode_images` gives for a split, on the device, in stored order: scaled features, (n, F).

    Images are encoded. Stored features are only scaled, after a check that the encoder of the model made them.

    Raises:
        DataError: the images have another shape than the model takes, another encoder made the features, or the method
            reads images and the dataset holds features.
    """
    check_shape(model, dataset)
    if dataset.kind == "images":
        return encode_images(model, dataset.images(split, reader, memory_limit_mb), device)
    if isinstance(model, MetaLearner) and not model.reads_features:
        remedy = image_remedy(dataset.content)
        raise DataError(f"{dataset.uri}: holds {dataset.content}, and the model adapts on images; {remedy}")
    check_encoder(model, dataset)
    if device.type == "cpu":
        keep_freed_memory()  # as `encode_images` does: episodes make and free large arrays
    raw = dataset.rows(split, reader, memory_limit_mb)
    pieces = [
        np.asarray(raw[np.arange(first, min(first + FEATURE_ROWS, len(raw)))])
        for first in range(0, len(raw), FEATURE_ROWS)
    ]
    model.eval()
    return scale_features(model, torch.cat([torch.from_numpy(h).float().to(device) for h in pieces]))


@torch.inference_mode()
def scale_features(model: EncoderModel, raw_nF: Tensor) -> Tensor:
    """Scale the raw features of the encoder as the model does: (n, F) -> (n, F)."""
    return torch.cat([model.scale_features(h) for h in raw_nF.split(FEATURE_ROWS)])


def check_shape(model: EncoderModel, dataset: Dataset) -> None:
    """Check that a model takes the images, or the vectors, of a data set.

    Raises:
        DataError: it takes others.
    """
    of_vectors = dataset.content == VECTORS
    if dataset.image_shape != model.image_shape or of_vectors != model.takes_vectors:
        held, taken = (
            describe_shape(dataset.image_shape, vectors=of_vectors),
            describe_shape(model.image_shape, vectors=model.takes_vectors),
        )
        raise DataError(f"{dataset.uri}: holds {held}, and the model takes {taken}; give data that it was trained for")


def check_encoder(model: EncoderModel, dataset: Dataset) -> None:
    """Check that the encoder of a model made the features of a data set.

    Raises:
        DataError: another encoder made them.
    """
    stored, expected = dataset.manifest["encoder"]["sha256"], encoder_digest(model.encoder)
    if stored != expected:
        raise DataError(
            f"{dataset.uri}: its features were made by encoder {stored[:12]}…, the model has encoder {expected[:12]}…; "
            "write features with the model: metagmvae features MODEL"
        )
