"""A training from its settings to a filled run folder: claimed, locked, recorded, tracked, run by the engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.infra.runs.run_folder import METRICS, read_lines
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.configs.schema import Settings
    from metagmvae.pipelines.shards.dataset import Dataset


from typing import TYPE_CHECKING

from metagmvae.configs.load import SettingsError, differences, fingerprint, settings_from_json, to_json
from metagmvae.configs.schema import Settings
from metagmvae.infra.runs.checks import check_data, device_of, with_encoder_of
from metagmvae.infra.runs.folder_lock import LOCK, lock_run_folder
from metagmvae.infra.runs.live_line import LiveLine
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import RECORD, SETTINGS
from metagmvae.infra.runs.wiring import train_here
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.shards.dataset import Dataset

if TYPE_CHECKING:
    from metagmvae.training.trainer.stages import ModelKind


def draw_figures(run_dir: Path, settings: Settings, dataset: Dataset) -> None:
    """Put the figures of a finished run into `figures/`; what cannot be drawn of this data is named on stderr."""
    from metagmvae.evaluation.figures.gallery import draw_gallery
    from metagmvae.training.trainer.package import load_model

    split = settings.data.validation_split
    lines = read_lines(run_dir / METRICS)
    try:
        draw_gallery(load_model(run_dir), dataset, split, run_dir / "figures", lines)
    except DataError as error:
        print(f"no figures were drawn: {error}", file=sys.stderr)


def run_training(
    settings: Settings, *, kind: ModelKind = "meta-gmvae", resume: bool = False, quiet: bool = False
) -> Path:
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
    with lock_run_folder(run_dir):
        _record(run_dir, settings, dataset, kind)
        with _tracker(run_dir, settings), LiveLine(run_dir, total, quiet=quiet):
            _train(settings, dataset, run_dir, kind, resume)
    return run_dir


def _train(settings: Settings, dataset: Dataset, run_dir: Path, kind: ModelKind, resume: bool) -> None:
    """By the engine of the settings; then the figures."""
    if settings.run.engine == "ray":
        from metagmvae.infra.cluster.train_on_ray import train_on_ray

        train_on_ray(settings, dataset.uri, run_dir, kind=kind, resume=resume)
    else:
        train_here(settings, dataset, LocalContext(run_dir, device_of(settings), resume=resume), kind)
    if settings.run.figures:
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


def _record(run_dir: Path, settings: Settings, dataset: Dataset, kind: ModelKind) -> None:
    """What is trained, on what, with what."""
    from metagmvae.evaluation.provenance import provenance

    fingerprints = {"settings_fingerprint": fingerprint(settings), "data_fingerprint": dataset.fingerprint}
    record = provenance() | fingerprints | {"data": dataset.uri, "engine": settings.run.engine, "kind": kind}
    write_json(run_dir / SETTINGS, json.loads(to_json(settings)))
    write_json(run_dir / RECORD, record)


def _tracker(run_dir: Path, settings: Settings) -> Any:
    """The MLflow mirror; without tracking nothing of MLflow is imported."""
    from metagmvae.infra.tracking.run_tracker import Tracker

    return Tracker(run_dir, settings.tracking)
