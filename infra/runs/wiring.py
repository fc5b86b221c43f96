"""The composition root of training: settings -> data, encoder, device, validation, training in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from metagmvae.configs.schema import Settings
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Dataset, Reader

if TYPE_CHECKING:
    import torch

    from metagmvae.training.trainer.context import RunContext, Validate
    from metagmvae.training.trainer.stages import ModelKind


def train_here(settings: Settings, dataset: Dataset, surroundings: RunContext, kind: ModelKind) -> None:
    """Train in this process, as the only one or as one of several ranks."""
    import torch

    from metagmvae.training.device.allocator import keep_freed_memory
    from metagmvae.training.trainer.stages import train

    if surroundings.device.type == "cpu":
        keep_freed_memory()
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    data = _images(settings, dataset, settings.data.train_split)
    # On every rank: it is called on rank 0 only, but all ranks must know when the others wait for it.
    validate = validation(settings, dataset, surroundings.device) if settings.validation.every else None
    image_shape, encoder = dataset.image_shape, None
    if dataset.kind == "features":
        from metagmvae.evaluation.fewshot.encoding import load_dataset_encoder

        carried = load_dataset_encoder(dataset)
        image_shape, encoder = carried.image_shape, carried.model.encoder.state_dict()
    fingerprint = dataset.fingerprint
    train(settings, data, image_shape, fingerprint, surroundings, validate, kind=kind, encoder=encoder)


def _images(settings: Settings, dataset: Dataset, split: str) -> Rows | StreamedImages:
    data = settings.data
    if data.reader == "stream":
        return StreamedImages(dataset, split, data.shuffle_buffer)
    return dataset.rows(split, _by_row(settings), data.memory_limit_mb)


def _by_row(settings: Settings) -> Reader:
    """The reader where rows are asked for by number on the host: judging, and what goes to the device at once."""
    reader = settings.data.reader
    return "mmap" if reader == "stream" or reader == "device" else reader


def validation(settings: Settings, dataset: Dataset, device: torch.device) -> Validate:
    """Judge a model on validation episodes: every image encoded once, then every shot."""
    from metagmvae.evaluation.fewshot.encoding import encode_split
    from metagmvae.evaluation.fewshot.validation import validate

    split = settings.data.validation_split

    def validate_model(model: Any) -> Mapping[str, Mapping[str, float]]:
        h_nF = encode_split(model, dataset, split, device, _by_row(settings), settings.data.memory_limit_mb)
        return validate(model, settings, h_nF, dataset.labels(split))

    return validate_model
