"""Runs the training of one process: the only process of the local engine, or one rank of several under Ray."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.validation import validate
from metagmvae.infra.runs.training_inputs import TrainingInputs
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Reader
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.context import RunContext, Validate
from metagmvae.training.trainer.stages import ModelKind, train


def train_in_process(inputs: TrainingInputs, context: RunContext, kind: ModelKind) -> None:
    """Train until the last step.

    Raises:
        NonFiniteLossError: a step had a loss that is not finite; the last checkpoint is kept.
    """
    settings, dataset, encoder = inputs.settings, inputs.dataset, inputs.encoder
    if context.device.type == "cpu":
        keep_freed_memory()
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    # Every rank gets the function although only rank 0 calls it: the other ranks must know when to wait for rank 0.
    validator = _validator(inputs, context.device) if settings.validation.every else None
    train(
        settings,
        _training_rows(inputs),
        inputs.image_shape,
        dataset.fingerprint,
        context,
        validator,
        kind=kind,
        encoder=encoder.model.encoder.state_dict() if encoder else None,
        labels=_training_labels(inputs, kind),
        preprocessing=dataset.preprocessing,
    )


def _training_rows(inputs: TrainingInputs) -> Rows | StreamedImages:
    data = inputs.settings.data
    if data.reader == "stream":
        return StreamedImages(inputs.dataset, data.train_split, data.shuffle_buffer)
    return inputs.dataset.rows(data.train_split, _random_access_reader(inputs.settings), data.memory_limit_mb)


def _training_labels(inputs: TrainingInputs, kind: ModelKind) -> EpisodeLabels | None:
    """The classes of the training images, and groups if they have them, for a method that needs them."""
    settings = inputs.settings
    if kind == "encoder" or not find_method(settings.method).needs_labels(settings):
        return None
    return inputs.dataset.episode_labels(settings.data.train_split)


def _random_access_reader(settings: Settings) -> Reader:
    """The reader for rows by index on the host: for validation, and for rows that are copied to the device once."""
    reader = settings.data.reader
    return "mmap" if reader == "stream" or reader == "device" else reader


def _validator(inputs: TrainingInputs, device: torch.device) -> Validate:
    """A function that encodes the validation split once and evaluates the model on episodes of every shot."""
    settings, dataset = inputs.settings, inputs.dataset
    split = settings.data.validation_split

    def validate_model(model: EncoderModel) -> Mapping[str, Mapping[str, float]]:
        reader, limit_mb = _random_access_reader(settings), settings.data.memory_limit_mb
        h_nF = encode_split(model, dataset, split, device, reader, limit_mb)
        return validate(model, settings, h_nF, dataset.episode_labels(split))

    return validate_model
