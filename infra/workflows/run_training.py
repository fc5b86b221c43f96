"""A training run from its settings to a complete run folder: checked, locked, recorded, tracked, trained, plotted."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metagmvae.configs.load import (
    SettingsError,
    differences,
    fingerprint,
    load_settings,
    settings_from_json,
    to_toml,
)
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.provenance import dataset_origin, provenance
from metagmvae.infra.runs.checks import check_model, check_settings
from metagmvae.infra.runs.folder_lock import check_not_in_use, lock_run_folder
from metagmvae.infra.runs.live_line import LiveLine
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import (
    CHECKPOINT,
    CONFIG,
    FIGURES,
    METRICS,
    RECORD,
    SETTINGS,
    clear_run_folder,
    folder_contents,
    read_lines,
    read_record,
    read_settings,
    remove_leftovers,
)
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import TrainingInputs, has_samples, load_inputs, select_device
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tracking.run_tracker import RunTracker
from metagmvae.infra.tracking.store import store_uri
from metagmvae.pipelines.files import atomic_file, read_text, write_json
from metagmvae.pipelines.optional_packages import optional_package
from metagmvae.pipelines.output_target import check_output_folder
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.package import load_model
from metagmvae.training.trainer.resume import check_same_run, stored_kind
from metagmvae.training.trainer.stages import STAGES, ModelKind

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """A training that has been checked and can start."""

    inputs: TrainingInputs
    kind: ModelKind
    run_dir: Path
    resume: bool
    device: torch.device | None
    """None with Ray, which assigns a device to each worker."""

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        settings = self.inputs.settings
        return settings.pretrain.steps + (settings.train.steps if self.kind == "learner" else 0)

    @property
    def resume_command(self) -> str:
        """The command that continues the training."""
        command = "train" if self.kind == "learner" else "pretrain"
        return f"metagmvae {command} {shlex.quote(str(self.run_dir))} --resume"


def load_run_settings(config: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a TOML file or preset as `load_settings`, or of a run folder, which is then `run.out`.

    Raises:
        SettingsError, DataError: the file, a key or a value is wrong.
    """
    folder = Path(config)
    if not (folder / SETTINGS).is_file():
        return load_settings(config, overrides)
    stored = {"run.out": str(folder.absolute()), "data.uri": read_record(folder).get("data")}
    own = [f"{key}={json.dumps(value)}" for key, value in stored.items() if value]
    return settings_from_json(read_text(folder / SETTINGS), [*own, *overrides])


def run_training(settings: Settings, *, kind: ModelKind = "learner", resume: bool = False, quiet: bool = False) -> Path:
    """Train in the run folder `settings.run.out`, tracked in MLflow if `tracking.enabled`; return the folder.

    The dataset, the encoder of a dataset of features, and the device are opened once here. Ray workers are other
    processes and open them again. A training that ends before its first checkpoint or metric line leaves the folder as
    it found it.

    Args:
        settings: settings of the run.
        kind: what is trained, the whole model or an encoder only.
        resume: continue from the checkpoint in the folder, if it has one.
        quiet: show no live progress line.

    Raises:
        SettingsError: the settings cannot run here, or differ from those of the run to resume.
        DataError: the dataset or the run folder cannot be used.
        NonFiniteLossError: a step had a loss that is not finite; the last checkpoint is kept.
        KeyboardInterrupt: a signal stopped the training; a note of the exception says how it continues.
    """
    with checked_training(settings, kind, resume) as plan, _claimed_folder(plan):
        run_dir, tracking = plan.run_dir, plan.inputs.settings.tracking
        with RunTracker(run_dir, tracking), LiveLine(run_dir, plan.total_steps, quiet=quiet) as live:
            _train(plan)
            if plan.kind == "learner":
                from metagmvae.infra.workflows.calibrate import calibrate_run  # imports SciPy

                with live.working_on("calibrating on validation episodes"):
                    calibrate_run(run_dir, plan.inputs.settings, plan.inputs.dataset)
            if plan.inputs.settings.run.figures:
                with live.working_on("drawing figures"):
                    _draw_figures(run_dir, plan.inputs)
    return run_dir


def describe_training(settings: Settings, *, kind: ModelKind, resume: bool) -> dict[str, Any]:
    """Check a training as `run_training` does, and return what it would do; nothing is written.

    Raises:
        SettingsError, DataError: as `run_training`.
    """
    with checked_training(settings, kind, resume, dry_run=True) as plan:
        settings, dataset = plan.inputs.settings, plan.inputs.dataset
        train_split = dataset.split(settings.data.train_split)
        answer: dict[str, Any] = {
            "dry run": "all checks passed, nothing was written",
            "run": str(plan.run_dir),
            "data": f"{dataset.uri}, {train_split['samples']:,} {dataset.kind} in {settings.data.train_split}",
            "steps": {
                name: getattr(settings, section).steps
                for name, section in (("pretrain", "pretrain"), ("meta", "train"))
                if name in STAGES[kind]
            },
            "engine": settings.run.engine if plan.device is None else f"local, {plan.device}",
        }
        if plan.device is None:
            answer["workers"] = settings.run.workers
        if resume and (plan.run_dir / CHECKPOINT).exists():
            state = load_state(plan.run_dir / CHECKPOINT)
            answer["resumes"] = f"{state['stage']} step {state['step']:,}"
        return answer


@contextmanager
def checked_training(
    settings: Settings, kind: ModelKind, resume: bool, *, dry_run: bool = False
) -> Iterator[TrainingPlan]:
    """Check everything that can be checked before the run folder is claimed; inside the block Ray is connected.

    A dry run starts no cluster of Ray.

    Raises:
        SettingsError, DataError: as `run_training`.
    """
    inputs = load_inputs(settings, Dataset.open(settings.data.uri))
    settings = inputs.settings
    check_settings(settings, inputs.dataset, kind)
    check_model(inputs, kind)
    if settings.tracking.enabled:
        store_uri(settings.tracking)  # refuses a URI that MLflow would refuse after the training
        import_mlflow("tracking.enabled = true", "--set tracking.enabled=false")
    run_dir = Path(settings.run.out).absolute()
    _check_folder(run_dir, inputs, kind, resume)
    if settings.run.engine == "local":
        yield TrainingPlan(inputs, kind, run_dir, resume, select_device(settings))
        return
    check_not_in_use(run_dir)
    with optional_package("ray", "run.engine = ray", "--set run.engine=local"):
        from metagmvae.infra.cluster.train_on_ray import training_cluster  # Ray is imported only where it is used

    with training_cluster(settings, dry_run=dry_run):
        yield TrainingPlan(inputs, kind, run_dir, resume, None)


@contextmanager
def _claimed_folder(plan: TrainingPlan) -> Iterator[None]:
    """Create and lock the run folder and write the record; undo it if the training ends before it has saved anything.

    Raises:
        DataError: the folder cannot be created, or another process trains in it.
    """
    run_dir = plan.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{run_dir}: cannot be created ({error.strerror}); set run.out to another folder") from error
    with lock_run_folder(run_dir):
        _check_folder(run_dir, plan.inputs, plan.kind, plan.resume)  # again: another process may have used it meanwhile
        is_new = SETTINGS not in folder_contents(run_dir)
        remove_leftovers(run_dir)
        if plan.resume and is_new:
            LOG.warning("%s: no checkpoint to resume from; training starts at step 1", run_dir)
        try:
            _write_record(run_dir, plan.inputs, plan.kind)
            yield
        except BaseException as error:
            nothing_saved = is_new and not (run_dir / CHECKPOINT).exists() and not read_lines(run_dir / METRICS)
            if nothing_saved:
                clear_run_folder(run_dir)
            if isinstance(error, KeyboardInterrupt):
                error.add_note("no step was saved; run the command again" if nothing_saved else _resume_note(plan))
            raise


def _resume_note(plan: TrainingPlan) -> str:
    if not (plan.run_dir / CHECKPOINT).exists():
        return f"no step is saved; start again with: {plan.resume_command}"
    state = load_state(plan.run_dir / CHECKPOINT)
    return f"{state['stage']} step {state['step']:,} is saved; continue with: {plan.resume_command}"


def _train(plan: TrainingPlan) -> None:
    if plan.device is not None:
        train_in_process(plan.inputs, LocalContext(plan.run_dir, plan.device, resume=plan.resume), plan.kind)
        return
    from metagmvae.infra.cluster.train_on_ray import train_on_ray

    train_on_ray(plan.inputs.settings, plan.inputs.dataset, plan.run_dir, kind=plan.kind, resume=plan.resume)


def _draw_figures(run_dir: Path, inputs: TrainingInputs) -> None:
    """Write the figures of the trained model; print a line on stderr where the data do not allow them."""
    from metagmvae.evaluation.figures.gallery import draw_gallery  # imports Matplotlib

    data = inputs.settings.data
    split = data.validation_split if has_samples(inputs.dataset, data.validation_split) else data.train_split
    try:
        draw_gallery(load_model(run_dir), inputs.dataset, split, run_dir / FIGURES, read_lines(run_dir / METRICS))
    except DataError as error:
        LOG.warning("no figures were drawn: %s", error)


def _check_folder(run_dir: Path, inputs: TrainingInputs, kind: ModelKind, resume: bool) -> None:
    """Check that the run folder is new or empty, or that it belongs to the run to resume."""
    contents = folder_contents(run_dir)
    if not resume:
        if contents or (run_dir.exists() and not run_dir.is_dir()):
            raise DataError(f"{run_dir}: not empty; continue with --resume, or choose another folder: --set run.out=…")
    elif SETTINGS in contents:
        _check_same_run(run_dir, inputs, kind)
    elif contents:
        raise DataError(f"{run_dir}: not a run folder (no {SETTINGS}); choose another one: --set run.out=…")
    check_output_folder(run_dir, f"run.out = {run_dir}")


def _check_same_run(run_dir: Path, inputs: TrainingInputs, kind: ModelKind) -> None:
    """Check that settings and dataset are those of the run, according to its record and to its checkpoint.

    Raises:
        SettingsError: other settings.
        DataError: other data.
        CheckpointError: the checkpoint is of another run.
    """
    recorded = read_record(run_dir)
    expected = stored_kind(inputs.settings, kind)
    if recorded.get("kind", expected) != expected:
        command = "pretrain" if recorded["kind"] == "encoder" else "train"
        raise DataError(f"{run_dir}: is a run of metagmvae {command}; resume it with that command")
    changed = differences(inputs.settings, read_settings(run_dir))
    if changed:
        raise SettingsError(f"{run_dir}: cannot resume with other settings ({'; '.join(changed)})")
    dataset = inputs.dataset
    if recorded.get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(f"{run_dir}: was trained on other data than {dataset.uri} holds now; start a new run")
    if (run_dir / CHECKPOINT).exists():
        state = load_state(run_dir / CHECKPOINT)
        check_same_run(state, inputs.settings, dataset.fingerprint, kind, run_dir / CHECKPOINT)


def _write_record(run_dir: Path, inputs: TrainingInputs, kind: ModelKind) -> None:
    """Write the settings, and the record of data, code version and machine."""
    settings, dataset = inputs.settings, inputs.dataset
    fingerprints = {"settings_fingerprint": fingerprint(settings), "data_fingerprint": dataset.fingerprint}
    about = {"data": dataset.uri, "engine": settings.run.engine, "kind": stored_kind(settings, kind)}
    record = provenance() | fingerprints | about
    record["dataset"] = dataset_origin(dataset.manifest, dataset.fingerprint)
    if dataset.preprocessing is not None:
        record["preprocessing"] = dataset.preprocessing.model_dump(mode="json")
    write_json(run_dir / SETTINGS, settings.model_dump(mode="json"))
    with atomic_file(run_dir / CONFIG) as file:
        file.write(to_toml(settings).encode())
    write_json(run_dir / RECORD, record)
