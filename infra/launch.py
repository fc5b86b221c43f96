"""A training from its settings to a filled run folder: claimed, locked, recorded, tracked, run by the engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.load import SettingsError, differences, fingerprint, settings_from_json, to_json
from configs.schema import Settings
from infra.progress import LiveLine
from infra.run_lock import LOCK, hold
from infra.surroundings import LocalSurroundings
from infra.wiring import RECORD, SETTINGS, check_data, device_of, train_here, with_encoder_of
from pipelines.dataset import Dataset
from pipelines.files import read_json, write_json
from pipelines.records import DataError

if TYPE_CHECKING:
    from training.run import Kind


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
        record = read_json(run_dir / RECORD) if (run_dir / RECORD).exists() else {}
        if record.get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint:
            raise DataError(f"{run_dir}: was trained on other data than {dataset.uri} holds now; start a new run")
    elif run_dir.is_dir() and any(path.name != LOCK for path in run_dir.iterdir()):
        raise DataError(f"{run_dir}: not a run folder (no {SETTINGS}); choose another one: --set run.out=…")
    else:
        print(f"{run_dir}: nothing to go on with; the run starts at its first step", file=sys.stderr)
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
