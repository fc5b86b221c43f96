"""Checks of the settings against the dataset, made before a run starts."""

from __future__ import annotations

import logging

import numpy as np

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import Settings
from metagmvae.infra.runs.training_inputs import TrainingInputs
from metagmvae.pipelines.grouped_labels import GroupedLabels, class_ids
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler, left_out_line
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.vectors import VECTORS, image_remedy
from metagmvae.training.methods.meta_step import MetaGMVAEMethod
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.methods.task_method import TaskMethod
from metagmvae.training.pretraining.objectives_by_name import find_objective
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.stages import ModelKind

LOG = logging.getLogger(__name__)


def check_settings(settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """Check splits, shards, encoder, and way and shots of the validation, so that no run fails after an hour.

    Raises:
        SettingsError: the settings do not fit the dataset.
        DataError: a split is missing, a shard is damaged, or a class has too few images.
    """
    dataset.split(settings.data.train_split)
    if kind == "learner":
        _check_method(settings, dataset)
    check_encoder_settings(settings, dataset, kind)
    if settings.pretrain.steps:
        samples = dataset.split(settings.data.train_split)["samples"]
        find_objective(settings.pretrain).check_images(settings, samples)
    if settings.data.reader == "stream":
        images = StreamedImages(dataset, settings.data.train_split, settings.data.shuffle_buffer)
        images.shards(settings.run.workers if settings.run.engine == "ray" else 1)
    else:
        dataset.rows(settings.data.train_split, "mmap", check=False)
    validation = settings.validation
    if validation.every:
        if not validation.shots:
            raise SettingsError("validation.shots is empty; give a number of shots, or set validation.every to 0")
        _check_validation(settings, dataset)


def _check_validation(settings: Settings, dataset: Dataset) -> None:
    """Draw an episode of each number of shots of the validation; a line names classes that are left out."""
    validation = settings.validation
    labels = dataset.episode_labels(settings.data.validation_split)
    task = {key: getattr(validation, key) for key in ("way", "query", "seed", "mix_groups")}
    try:
        for shot in validation.shots:
            sampler = EpisodeSampler(labels, shot=shot, **task)
            sampler.episode(0)
            if sampler.left_out:
                LOG.warning("%s", left_out_line("validation", shot, validation.query, sampler.left_out))
    except DataError as error:
        keys = "validation.way, validation.shots and validation.query"
        raise DataError(f"{dataset.uri}: validation: {error} ({keys}), or set validation.every to 0") from error


def check_model(inputs: TrainingInputs, kind: ModelKind) -> None:
    """Build the model once, so that a wrong encoder or image size is found before the run folder is claimed.

    Raises:
        EncoderError: there is no such encoder, or it does not accept such images.
        SettingsError: the model cannot classify the tasks of the validation, or not be compiled.
    """
    settings = inputs.settings
    if kind == "encoder":
        build_encoder_model(settings.model, inputs.image_shape, seed=0)
        return
    model = build_model(settings.model, inputs.image_shape, 0, settings.method)
    if settings.train.compile and not model.compiled_networks:
        raise SettingsError(
            f"train.compile is true, but the network of {settings.method.name} cannot be compiled, because its "
            "gradient steps differentiate it; set it to false"
        )
    most, way = model.most_classes, settings.validation.way
    if settings.validation.every and most is not None and way > most:
        raise SettingsError(f"validation.way is {way}, but the model classifies up to {most} classes (method.way)")


def check_encoder_settings(settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """Check that the encoder of the settings fits the dataset and what is trained.

    Raises:
        SettingsError: naming the key.
    """
    if kind == "encoder":
        _check_encoder_training(settings, dataset)
        return
    method = find_method(settings.method)
    needed = 'model.reconstruct = "features"' if isinstance(method, MetaGMVAEMethod) else _reason(settings)
    holds = f"data.uri: {dataset.uri} holds {dataset.content}"
    if dataset.kind == "features" and not method.on_features(settings):
        remedy = needed if isinstance(method, MetaGMVAEMethod) else 'method.network = "mlp"'
        raise SettingsError(f"{holds}, and the method learns from images: set {remedy}{_or_preset(dataset)}")
    if dataset.kind == "features" and isinstance(method, TaskMethod) and settings.method.tasks == "images":
        remedy = "set method.tasks to clusters or labels, or train on images with pretrain.steps above 0"
        raise SettingsError(f'{holds}, and method.tasks = "images" augments images: {remedy}')
    if dataset.kind == "features" and settings.pretrain.steps:
        held = "vectors, which no encoder reads" if dataset.content == VECTORS else "features of a trained encoder"
        raise SettingsError(
            f"pretrain.steps is {settings.pretrain.steps}, but {dataset.uri} holds {held}: set it to 0"
            f"{_or_preset(dataset)}"
        )
    if dataset.kind == "images" and method.needs_encoder(settings) and not settings.pretrain.steps:
        raise SettingsError(
            f"{needed} needs a trained encoder, but {dataset.uri} holds images: set pretrain.steps above 0, or train "
            "on the output of `metagmvae features`"
        )


def _or_preset(dataset: Dataset) -> str:
    return ", or use the preset vectors" if dataset.content == VECTORS else ""


def _reason(settings: Settings) -> str:
    """The setting because of which a method that learns from tasks needs a trained encoder."""
    return 'method.network = "mlp"' if settings.method.network == "mlp" else 'method.tasks = "clusters"'


def _check_method(settings: Settings, dataset: Dataset) -> None:
    """Check what the method reads."""
    method, name = find_method(settings.method), settings.method.name
    if method.needs_steps(settings) and not settings.train.steps:
        raise SettingsError("train.steps is 0: set it to the number of meta-training steps, or use metagmvae pretrain")
    if settings.train.steps and not method.needs_steps(settings):
        raise SettingsError(f"train.steps is {settings.train.steps}, but {name} is not meta-trained: set it to 0")
    if settings.data.reader == "stream" and not method.reads_sequentially:
        raise SettingsError(
            f'data.reader ("stream") reads images sequentially, and {name} reads them by index: set it to mmap'
        )
    given = dataset.episode_labels(settings.data.train_split) if method.needs_labels(settings) else None
    labels = None if given is None else class_ids(given)
    if labels is not None and len(np.unique(labels[labels >= 0])) < 2:
        raise SettingsError(f'method.tasks is "labels", but the images of {dataset.uri} have no classes')
    method.check_data(settings, dataset.split(settings.data.train_split)["samples"], labels)
    if isinstance(given, GroupedLabels):
        method.check_groups(settings, given)


def _check_encoder_training(settings: Settings, dataset: Dataset) -> None:
    """Check the settings of `metagmvae pretrain`, which trains an encoder only."""
    if dataset.kind == "features":
        remedy = image_remedy(dataset.content)
        raise SettingsError(
            f"data.uri: {dataset.uri} holds {dataset.content}; an encoder is trained on images: {remedy}"
        )
    if not settings.pretrain.steps:
        raise SettingsError("pretrain.steps is 0: set it to the number of pre-training steps")
