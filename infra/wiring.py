"""The composition root of training: settings -> data, device, validation, engine, run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.load import SettingsError, differences, fingerprint, settings_from_json, to_json
from configs.schema import Settings
from infra.progress import LiveLine
from infra.run_lock import LOCK, hold
from infra.surroundings import LocalSurroundings
from pipelines.dataset import Dataset, Reader
from pipelines.files import write_json
from pipelines.records import DataError

if TYPE_CHECKING:
    import torch

    from training.hooks import Surroundings, Validate
    from training.run import Kind

ENCODER_KEYS = ("encoder", "image_size", "channels", "rectified")
"""Keys of [model] that say what the encoder is."""
SETTINGS = "settings.json"
RECORD = "run.json"


def run_training(settings: Settings, *, kind: Kind = "meta-gmvae", resume: bool = False, quiet: bool = False) -> Path:
    """Train in the run folder `settings.run.out`, tracked in MLflow if that is on; return the folder.

    Args:
        settings: of the run.
        kind: what is trained, a whole model or an encoder alone.
        resume: go on from the checkpoint in the folder, if there is one.
        quiet: no live line.

    Raises:
        SettingsError: the settings cannot be run here, or differ from those of the run to resume.
        DataError: the data set or the run folder cannot be used.
        NonFiniteLossError: training went wrong; the last checkpoint stays.
    """
    dataset = Dataset.open(settings.data.uri)
    settings = with_encoder_of(settings, dataset)
    check_data(settings, dataset, kind)
    device_of(settings)
    run_dir = Path(settings.run.out).absolute()
    _claim(run_dir, settings, dataset, resume)
    total = settings.pretrain.steps + (settings.train.steps if kind == "meta-gmvae" else 0)
    with hold(run_dir):
        _record(run_dir, settings, dataset, kind)
        with _tracker(run_dir, settings), LiveLine(run_dir, total, quiet=quiet):
            _train(settings, dataset, run_dir, kind, resume)
    return run_dir


def _train(settings: Settings, dataset: Dataset, run_dir: Path, kind: Kind, resume: bool) -> None:
    """By the engine of the settings; then the figures."""
    if settings.run.engine == "ray":
        from infra.ray_train import train_on_ray

        train_on_ray(settings, dataset.uri, run_dir, kind=kind, resume=resume)
    else:
        train_here(settings, dataset, LocalSurroundings(run_dir, device_of(settings), resume=resume), kind)
    if settings.run.figures:
        from infra.run_results import draw_figures

        draw_figures(run_dir, settings, dataset)


def train_here(settings: Settings, dataset: Dataset, surroundings: Surroundings, kind: Kind) -> None:
    """Train in this process, as the only one or as one of several ranks."""
    import torch

    from training.run import train

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
        return dataset.streamed(split, data.shuffle_buffer)
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


def _claim(run_dir: Path, settings: Settings, dataset: Dataset, resume: bool) -> None:
    """Make the run folder ours, or check that it is the one to go on with."""
    known = run_dir / SETTINGS
    if not resume:
        if run_dir.exists() and (not run_dir.is_dir() or any(path.name != LOCK for path in run_dir.iterdir())):
            raise DataError(f"{run_dir}: not empty; go on with --resume, or choose another folder: --set run.out=…")
    elif known.exists():
        changed = differences(settings, settings_from_json(known.read_text(encoding="utf-8")))
        if changed:
            raise SettingsError(f"{run_dir}: cannot resume with other settings ({'; '.join(changed)})")
        record = json.loads((run_dir / RECORD).read_text(encoding="utf-8")) if (run_dir / RECORD).exists() else {}
        if record.get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint:
            raise DataError(f"{run_dir}: was trained on other data than {dataset.uri} holds now; start a new run")
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise DataError(f"{run_dir}: not a run folder (no {SETTINGS}); choose another one: --set run.out=…")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{run_dir}: cannot be made ({error.strerror}); set run.out to another folder") from error


def _record(run_dir: Path, settings: Settings, dataset: Dataset, kind: Kind) -> None:
    """What is trained, on what, with what."""
    from evaluation.environment import environment_record

    fingerprints = {"settings_fingerprint": fingerprint(settings), "data_fingerprint": dataset.fingerprint}
    record = environment_record() | fingerprints | {"data": dataset.uri, "engine": settings.run.engine, "kind": kind}
    write_json(run_dir / SETTINGS, json.loads(to_json(settings)))
    write_json(run_dir / RECORD, record)


def _tracker(run_dir: Path, settings: Settings) -> Any:
    """The MLflow mirror; without tracking nothing of MLflow is imported."""
    from infra.tracking import Tracker

    return Tracker(run_dir, settings.tracking)


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
