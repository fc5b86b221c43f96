"""A training run from its settings to a complete run folder: checked, locked, recorded, tracked, trained, plotted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from metagmvae.configs.load import SettingsError, differences, fingerprint, to_json
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.figures.gallery import draw_gallery
from metagmvae.evaluation.provenance import provenance
from metagmvae.infra.runs.checks import check_settings
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.live_line import LiveLine
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import (
    CHECKPOINT,
    FIGURES,
    METRICS,
    RECORD,
    SETTINGS,
    folder_contents,
    read_lines,
    read_record,
    read_settings,
    remove_leftovers,
)
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import TrainingInputs, load_inputs, select_device
from metagmvae.infra.tracking.run_tracker import RunTracker
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.package import load_model
from metagmvae.training.trainer.resume import check_same_run
from metagmvae.training.trainer.stages import ModelKind


def run_training(
    settings: Settings, *, kind: ModelKind = "meta-gmvae", resume: bool = False, quiet: bool = False
) -> Path:
    """Train in the run folder `settings.run.out`, tracked in MLflow if `tracking.enabled`; return the folder.

    The dataset, the encoder of a dataset of features, and the device are opened once here. Ray workers are other
    processes and open them again.

    Args:
        settings: settings of the run.
        kind: what is trained, the whole model or an encoder only.
        resume: continue from the checkpoint in the folder, if it has one.
        quiet: show no live progress line.

    Raises:
        SettingsError: the settings cannot run here, or differ from those of the run to resume.
        DataError: the dataset or the run folder cannot be used.
        NonFiniteLossError: a step had a loss that is not finite; the last checkpoint is kept.
    """
    inputs = load_inputs(settings, Dataset.open(settings.data.uri))
    settings = inputs.settings
    check_settings(settings, inputs.dataset, kind)
    device = select_device(settings) if settings.run.engine == "local" else None  # Ray assigns a device to each worker
    run_dir = Path(settings.run.out).absolute()
    _prepare_folder(run_dir, inputs, kind, resume)
    total_steps = settings.pretrain.steps + (settings.train.steps if kind == "meta-gmvae" else 0)
    with lock_run_folder(run_dir):
        remove_leftovers(run_dir)
        _write_record(run_dir, inputs, kind)
        with RunTracker(run_dir, settings.tracking), LiveLine(run_dir, total_steps, quiet=quiet):
            _train(inputs, run_dir, device, kind, resume)
            if settings.run.figures:
                _draw_figures(run_dir, inputs)
    return run_dir


def _train(inputs: TrainingInputs, run_dir: Path, device: torch.device | None, kind: ModelKind, resume: bool) -> None:
    if device is not None:
        train_in_process(inputs, LocalContext(run_dir, device, resume=resume), kind)
        return
    from metagmvae.infra.cluster.train_on_ray import train_on_ray  # Ray is imported only where it is used

    train_on_ray(inputs.settings, inputs.dataset.uri, run_dir, kind=kind, resume=resume)


def _draw_figures(run_dir: Path, inputs: TrainingInputs) -> None:
    """Write the figures of the trained model; print a line on stderr where the data do not allow them."""
    split = inputs.settings.data.validation_split
    try:
        draw_gallery(load_model(run_dir), inputs.dataset, split, run_dir / FIGURES, read_lines(run_dir / METRICS))
    except DataError as error:
        print(f"no figures were drawn: {error}", file=sys.stderr)


def _prepare_folder(run_dir: Path, inputs: TrainingInputs, kind: ModelKind, resume: bool) -> None:
    """Create the run folder, or check that the existing one belongs to the run to resume."""
    contents = folder_contents(run_dir)
    if not resume:
        if contents or (run_dir.exists() and not run_dir.is_dir()):
            raise DataError(f"{run_dir}: not empty; continue with --resume, or choose another folder: --set run.out=…")
    elif SETTINGS in contents:
        _check_same_run(run_dir, inputs, kind)
    elif contents:
        raise DataError(f"{run_dir}: not a run folder (no {SETTINGS}); choose another one: --set run.out=…")
    else:
        print(f"{run_dir}: no checkpoint to resume from; training starts at step 1", file=sys.stderr)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{run_dir}: cannot be created ({error.strerror}); set run.out to another folder") from error


def _check_same_run(run_dir: Path, inputs: TrainingInputs, kind: ModelKind) -> None:
    """Check that settings and dataset are those of the run, according to its record and to its checkpoint.

    Raises:
        SettingsError: other settings.
        DataError: other data.
        CheckpointError: the checkpoint is of another run.
    """
    changed = differences(inputs.settings, read_settings(run_dir))
    if changed:
        raise SettingsError(f"{run_dir}: cannot resume with other settings ({'; '.join(changed)})")
    dataset = inputs.dataset
    if read_record(run_dir).get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(f"{run_dir}: was trained on other data than {dataset.uri} holds now; start a new run")
    if (run_dir / CHECKPOINT).exists():
        state = load_state(run_dir / CHECKPOINT)
        check_same_run(state, inputs.settings, dataset.fingerprint, kind, run_dir / CHECKPOINT)


def _write_record(run_dir: Path, inputs: TrainingInputs, kind: ModelKind) -> None:
    """Write the settings, and the record of data, code version and machine."""
    settings, dataset = inputs.settings, inputs.dataset
    fingerprints = {"settings_fingerprint": fingerprint(settings), "data_fingerprint": dataset.fingerprint}
    record = provenance() | fingerprints | {"data": dataset.uri, "engine": settings.run.engine, "kind": kind}
    if dataset.preprocessing is not None:
        record["preprocessing"] = dataset.preprocessing.model_dump(mode="json")
    write_json(run_dir / SETTINGS, json.loads(to_json(settings)))
    write_json(run_dir / RECORD, record)
