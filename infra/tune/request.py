"""A sweep from its request to its end: checked, claimed, run on Ray, mirrored to MLflow, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import Settings
from metagmvae.configs.search_space import Space
from metagmvae.infra.runs.checks import check_settings
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.training_inputs import ENCODER_KEYS, load_inputs, select_device
from metagmvae.infra.tune.search import GridSearch, Search
from metagmvae.infra.tune.sweep_folder import SweepFolder, SweepPlan
from metagmvae.infra.tune.sweep_state import BEST, SweepState, check_validated
from metagmvae.infra.tune.sweep_tracker import SweepTracker
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import Progress
from metagmvae.pipelines.shards.dataset import Dataset

TRIALS = 20
"""Of a random or TPE search, where nothing else is asked for."""


@dataclass(frozen=True)
class SweepRequest:
    """What `metagmvae tune` was asked for."""

    base: Settings
    space: Space
    out: Path
    search: Search = "random"
    scheduler: str = "asha"
    name: str = ""
    """Empty: that of the folder."""
    trials: int | None = None
    hours: float | None = None
    at_once: int = 0
    """Trials; 0: as many as there are CPUs and GPUs for."""
    gpus: float | None = None
    task: str = ""
    """Empty: the first of validation.shots."""
    seed: int = 0
    keep_all: bool = False
    resume: bool = False


def run(request: SweepRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Run a sweep, or go on with it; return what came of it.

    Raises:
        SettingsError: something in the request is wrong, or another sweep is to be resumed than is there.
        DataError: the data or the folder cannot be used.
    """
    from metagmvae.infra.tune.ray_backend import run_sweep, sweep_cluster

    dataset = Dataset.open(request.base.data.uri)
    plan = _plan(request, dataset)
    folder = SweepFolder(request.out)
    folder.make(request.resume)
    with lock_run_folder(folder.root, setting="--out DIR"):
        folder.keep(plan, dataset)
        trials = request.trials or (None if request.search == "grid" else TRIALS)
        sweep = SweepState(plan, folder, dataset, trials, request.hours, request.keep_all)
        total = trials or GridSearch(request.space, request.seed).size
        try:
            with sweep_cluster(plan.base, request.at_once), SweepTracker(sweep, request.base.tracking) as tracker:
                run_sweep(sweep, request.at_once, request.gpus, _counting(sweep, total, progress))
                return finish(sweep, tracker)
        except Exception:
            if not sweep.taken:
                folder.clear()  # nothing could be tried: the same folder will do for the next request
            raise


def finish(sweep: SweepState, tracker: SweepTracker) -> dict[str, Any]:
    """The end of a sweep: best settings, what it says, what MLflow calls the trials, the answer."""
    from metagmvae.evaluation.sweeps.report import REPORT, SUMMARY, write_report

    best = sweep.write_best()
    summary = write_report(sweep.folder.root)
    tracker.close()
    trials = tracker.with_runs(sweep.trials())
    sweep.folder.rewrite(trials)
    if summary["best"]:
        # Only now: the report goes to MLflow with the last trials, and their runs are known when it is there.
        runs = {trial.number: trial.run_id for trial in trials}
        named = summary["best"] | {"run_id": runs[summary["best"]["number"]]}
        write_json(sweep.folder.root / SUMMARY, summary | {"best": named})
    counts = Counter(trial.status for trial in trials)
    answer: dict[str, Any] = {"sweep": str(sweep.folder.root), "name": sweep.plan.name, "trials": dict(counts)}
    if best is None or best.last is None:
        return answer | {"best": None, "why": _last_reason(sweep)}
    found = {"number": best.number, "accuracy": best.last.accuracy, "ci95": best.last.ci95, "task": sweep.plan.task}
    root = sweep.folder.root
    next_ = {"train": f"metagmvae train {root / BEST}", "report": str(root / REPORT)}
    return answer | {"best": found, "settings": best.settings} | next_


def _last_reason(sweep: SweepState) -> str:
    return next((trial.reason for trial in reversed(sweep.ended.values()) if trial.reason), "no trial was judged")


def _counting(sweep: SweepState, total: int, progress: Progress | None) -> Callable[[], None]:
    def count() -> None:
        if progress is not None:
            progress(sum(trial.status != "refused" for trial in sweep.ended.values()), total)

    return count


def _plan(request: SweepRequest, dataset: Dataset) -> SweepPlan:
    """Check what every trial has in common.

    Raises:
        SettingsError, DataError: naming what is wrong.
    """
    base = load_inputs(request.base, dataset).settings
    check_numbers(request)
    if dataset.kind == "features":
        for key in (f"model.{key}" for key in ENCODER_KEYS):
            if key in request.space.to_dict():
                raise SettingsError(
                    f"{key}: the features of {dataset.uri} were made with one; leave it out of the space"
                )
    if "train.steps" not in request.space.to_dict():
        check_validated(base)
    check_settings(base, dataset, "meta-gmvae")
    select_device(base)
    tasks = [f"{base.validation.way}w{shot}s" for shot in base.validation.shots]
    task = request.task or tasks[0]
    if task not in tasks:
        raise SettingsError(f"--task {task}: trials are judged on {', '.join(tasks)}; set validation.way and .shots")
    if request.search == "grid":
        GridSearch(request.space, request.seed)  # refuses what has no list of values
    name = request.name or request.out.name
    return SweepPlan(name, base, request.space, request.search, request.scheduler, request.seed, task)


def check_numbers(request: SweepRequest) -> None:
    """Numbers of the request that can be wrong by themselves."""
    if request.trials is not None and request.trials < 1:
        raise SettingsError(f"--trials is {request.trials}; give 1 or more")
    if request.hours is not None and not 0 < request.hours < float("inf"):
        raise SettingsError(f"--hours is {request.hours:g}; give a number of hours above 0")
    if request.seed < 0:
        raise SettingsError(f"--seed is {request.seed}; give 0 or more")
    if request.gpus is not None and not request.gpus >= 0:
        raise SettingsError(f"--gpus-per-trial is {request.gpus:g}; give 0 or more")
    if request.gpus is not None and request.base.run.engine == "ray":
        raise SettingsError(
            "--gpus-per-trial goes with trials in one process, and run.engine is ray: each worker has a GPU to itself"
        )
    if request.gpus is not None and request.gpus > 1 and request.gpus != int(request.gpus):
        raise SettingsError(f"--gpus-per-trial is {request.gpus:g}; above 1 it is a whole number")
