"""Runs a sweep from a request: check the request, lock the folder, run the trials, write the results."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metagmvae.configs.load import SettingsError, is_option
from metagmvae.configs.schema import Settings
from metagmvae.configs.search_space import Space, with_values
from metagmvae.infra.runs.checks import check_model, check_settings
from metagmvae.infra.runs.folder_lock import check_not_in_use, lock_run_folder
from metagmvae.infra.runs.run_folder import CHECKPOINT
from metagmvae.infra.runs.training_inputs import ENCODER_KEYS, has_samples, load_inputs
from metagmvae.infra.tracking.mlflow_environment import import_mlflow
from metagmvae.infra.tune.search import GridSearch, Search
from metagmvae.infra.tune.sweep_folder import SweepFolder, SweepPlan
from metagmvae.infra.tune.sweep_state import BEST, SweepState, check_validation_interval
from metagmvae.infra.tune.sweep_tracker import SweepTracker
from metagmvae.pipelines.optional_packages import optional_package
from metagmvae.pipelines.records import DataError, ProgressCallback
from metagmvae.pipelines.shards.dataset import Dataset

DEFAULT_TRIALS = 20
"""Of a random or TPE search."""


@dataclass(frozen=True)
class SweepRequest:
    """The options of `metagmvae tune`."""

    base: Settings
    """Settings that the trials have in common."""
    space: Space
    out: Path
    search: Search = "random"
    scheduler: str = "asha"
    name: str = ""
    """Empty: the name of the folder."""
    trials: int | None = None
    """None: the whole grid, or DEFAULT_TRIALS."""
    hours: float | None = None
    """None: no limit."""
    at_once: int = 0
    """Simultaneous trials; 0: as many as the CPUs and GPUs allow."""
    gpus: float | None = None
    """GPUs per trial in one process; None: one if the cluster has any."""
    task: str = ""
    """Empty: the first of validation.shots."""
    seed: int = 0
    keep_all: bool = False
    """Keep the checkpoints of all trials."""
    resume: bool = False
    dry_run: bool = False
    """Only check the request and say what would be done."""


def run(request: SweepRequest, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Run or resume a sweep and return the answer of `metagmvae tune`.

    Raises:
        SettingsError: an option or setting is wrong, or the sweep in the folder has another plan.
        DataError: the dataset or the folder cannot be used.
    """
    dataset = Dataset.open(request.base.data.uri)
    plan = _make_plan(request, dataset)
    folder = SweepFolder(request.out)
    folder.check(request.resume)
    check_not_in_use(folder.root, setting="--out DIR")
    folder.check_plan(plan, dataset)
    if request.base.tracking.enabled:
        import_mlflow("tracking.enabled = true", "--set tracking.enabled=false")
    with optional_package("ray.tune", "metagmvae tune"):
        from metagmvae.infra.tune.ray_backend import run_sweep, sweep_cluster

    max_trials = request.trials or (None if request.search == "grid" else DEFAULT_TRIALS)
    total = max_trials or GridSearch(request.space, request.seed).size
    with sweep_cluster(plan.base, request.at_once, dry_run=request.dry_run):
        if request.dry_run:
            return _describe(plan, folder, dataset, total)
        folder.create()
        with lock_run_folder(folder.root, setting="--out DIR"):
            folder.check(request.resume)  # again: another process may have used it meanwhile
            folder.write_or_check_plan(plan, dataset)
            sweep = SweepState(plan, folder, dataset, max_trials, request.hours, request.keep_all)
            try:
                with SweepTracker(sweep, request.base.tracking) as tracker:
                    run_sweep(sweep, request.at_once, request.gpus, _trial_counter(sweep, total, progress))
                    return finish(sweep, tracker)
            except BaseException as error:
                if not sweep.started:
                    folder.clear()  # no trial was possible: the next request can use the same folder
                if isinstance(error, KeyboardInterrupt):
                    error.add_note(_stop_note(sweep))
                raise


def _stop_note(sweep: SweepState) -> str:
    if not sweep.started:
        return "no trial had started; run the command again"
    unfinished = len(sweep.running) + len(sweep.unfinished)
    counts = f"trials that have ended: {len(sweep.ended)}; interrupted: {unfinished}"
    return f"{counts}; the same command with --resume continues"


def _describe(plan: SweepPlan, folder: SweepFolder, dataset: Dataset, total: int) -> dict[str, Any]:
    """What a dry run answers."""
    return {
        "dry run": "all checks passed, nothing was written",
        "sweep": str(folder.root),
        "data": dataset.uri,
        "trials": total,
        "search": plan.search,
        "scheduler": plan.scheduler,
        "task": plan.task,
        "varied": list(plan.space.to_dict()),
        "engine": plan.base.run.engine,
    }


def finish(sweep: SweepState, tracker: SweepTracker) -> dict[str, Any]:
    """Write the best settings and the report, upload them, and return the answer of `metagmvae tune`."""
    from metagmvae.evaluation.sweeps.report import REPORT, write_report

    root = sweep.folder.root
    best = sweep.write_best()
    not_calibrated = calibrate_kept(sweep)
    tracker.flush()  # creates the MLflow runs of the last trials; the table and the report contain their IDs
    trials = tracker.with_runs(sweep.trials())
    sweep.folder.rewrite_trials(trials)
    write_report(root)
    tracker.close()
    counts = Counter(trial.status for trial in trials)
    answer: dict[str, Any] = {"sweep": str(root), "name": sweep.plan.name, "trials": dict(counts)}
    answer |= {"not_calibrated": not_calibrated} if not_calibrated else {}
    if best is None or best.last is None:
        return answer | {"best": None, "why": _last_reason(sweep)}
    score = {"number": best.number, "accuracy": best.last.accuracy, "ci95": best.last.ci95, "task": sweep.plan.task}
    files = {"train": f"metagmvae train {shlex.quote(str(root / BEST))}", "report": str(root / REPORT)}
    return answer | {"best": score, "settings": best.settings} | files


def calibrate_kept(sweep: SweepState) -> dict[str, str]:
    """Calibrate the trials whose checkpoints are kept, as `metagmvae train` does, unless they are calibrated already.

    Returns:
        Number of each trial that cannot be calibrated, such as one with a damaged checkpoint, and the reason.
    """
    from metagmvae.infra.workflows.calibrate import calibrate_run
    from metagmvae.training.trainer.checkpoint import CheckpointError
    from metagmvae.training.trainer.package import load_model

    reasons: dict[str, str] = {}
    for trial in sweep.trials():
        folder = sweep.folder.trial_folder(trial.number)
        usable = trial.status in ("finished", "stopped") and trial.curve
        if not (usable and (folder / CHECKPOINT).is_file()):
            continue
        try:
            if load_model(folder).calibration is None:
                calibrate_run(folder, sweep.folder.trial_settings(trial.number), sweep.dataset)
        except (CheckpointError, DataError) as error:
            reasons[str(trial.number)] = str(error)
    return reasons


def _last_reason(sweep: SweepState) -> str:
    reasons = (trial.reason for trial in reversed(sweep.ended.values()) if trial.reason)
    return next(reasons, "no trial has been validated")


def _trial_counter(sweep: SweepState, total: int, progress: ProgressCallback | None) -> Callable[[], None]:
    """A function that shows the number of ended trials, without refused ones, on the progress bar."""

    def count() -> None:
        if progress is not None:
            progress(sum(trial.status != "refused" for trial in sweep.ended.values()), total)

    return count


def _make_plan(request: SweepRequest, dataset: Dataset) -> SweepPlan:
    """Check what all trials have in common, and return the plan.

    Raises:
        SettingsError, DataError: an option, a setting or the dataset does not fit.
    """
    if not has_samples(dataset, request.base.data.validation_split):
        raise SettingsError(
            f"{dataset.uri}: has no split {request.base.data.validation_split!r}, by which a sweep ranks its trials: "
            "write the dataset with validation classes, or set data.validation_split"
        )
    inputs = load_inputs(request.base, dataset)
    base = inputs.settings
    check_numbers(request)
    space = request.space.to_dict()
    if dataset.kind == "features":
        for key in (f"model.{key}" for key in ENCODER_KEYS):
            if key in space:
                raise SettingsError(
                    f"{key}: the encoder of the features in {dataset.uri} fixes it; remove it from the search space"
                )
    if "train.steps" not in space:
        check_validation_interval(base)
    # A wrong option of a method, encoder or objective would fail every trial.
    options = {d.name: d.boundary_values()[0] for d in request.space.dimensions if is_option(d.name)}
    first = with_values(base, options)
    check_settings(first, dataset, "learner")
    check_model(replace(inputs, settings=first), "learner")
    tasks = [f"{base.validation.way}w{shot}s" for shot in base.validation.shots]
    task = request.task or tasks[0]
    if task not in tasks:
        raise SettingsError(f"--task {task}: not one of {', '.join(tasks)}; set validation.way and validation.shots")
    if request.search == "grid":
        GridSearch(request.space, request.seed)  # refuses intervals
    name = request.name or request.out.name
    return SweepPlan(name, base, request.space, request.search, request.scheduler, request.seed, task)


def check_numbers(request: SweepRequest) -> None:
    """Check the ranges of the numeric options.

    Raises:
        SettingsError: naming the option and its range.
    """
    if request.trials is not None and request.trials < 1:
        raise SettingsError(f"--trials is {request.trials}; give 1 or more")
    if request.hours is not None and not 0 < request.hours < float("inf"):
        raise SettingsError(f"--hours is {request.hours:g}; give a number of hours above 0")
    if request.seed < 0:
        raise SettingsError(f"--seed is {request.seed}; give 0 or more")
    if request.gpus is None:
        return
    if not request.gpus >= 0:
        raise SettingsError(f"--gpus-per-trial is {request.gpus:g}; give 0 or more")
    if request.base.run.engine == "ray":
        raise SettingsError(
            "--gpus-per-trial is for trials in one process, but run.engine is ray, where each worker has its own GPU; "
            "leave it out"
        )
    if request.gpus > 1 and request.gpus != int(request.gpus):
        raise SettingsError(f"--gpus-per-trial is {request.gpus:g}; above 1 it must be an integer")
