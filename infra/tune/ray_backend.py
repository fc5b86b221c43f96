"""Runs the trials of a sweep with Ray Tune, which places them, stops them early and replaces lost workers.

A resume does not rely on Ray Tune's saved state: that requires the original objects, cannot be reconciled with the
table of trials, and is not known to work with Optuna. A resumed sweep is a new run of Tune. Its searcher returns the
unfinished trials first, and its scheduler is given the curves of all trials that have ended.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from metagmvae.configs.load import SettingsError
from metagmvae.configs.schema import RunSettings, Settings
from metagmvae.infra.cluster.connect import cluster, gpu_count
from metagmvae.infra.cluster.worker_failures import failure_reason
from metagmvae.infra.runs.run_folder import RAY_FOLDER
from metagmvae.infra.tune.sweep_state import SweepState
from metagmvae.infra.tune.trial import OUTSIDE, run_trial
from metagmvae.pipelines.records import WorkError

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Tune's checkpoint is never read, and writing it takes longer with each trial.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}
REDUCTION = 3
"""ASHA: at each rung the best third of the trials continues, and each rung is three times as far as the one before."""
UNREACHABLE_STEP = 10**9
DRIVER_CPUS = 0.01
"""CPUs reserved by a distributed trial itself, which only waits for its workers."""


@contextmanager
def sweep_cluster(base: Settings, at_once: int, *, dry_run: bool = False) -> Iterator[None]:
    """Join or start the Ray cluster of a sweep.

    Args:
        base: settings that all trials have in common.
        at_once: number of simultaneous trials; 0: as many as the CPUs and GPUs allow.
        dry_run: start no cluster.

    Raises:
        SettingsError: the cluster cannot be reached, is too small, or lacks what distributed trials need.
    """
    run = base.run
    distributed = run.engine == "ray"
    cpus_per_trial = run.cpus_per_worker * (run.workers if distributed else 1)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # A distributed trial takes a hundredth of a CPU besides its workers, so one more whole CPU is needed.
    cpus = cpus_per_trial * max(at_once, 1) + int(distributed)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with cluster(run.address, cpus, dashboard=distributed, dry_run=dry_run):
        if run.device == "cuda" and not gpu_count():
            raise SettingsError('run.device = "cuda": the Ray cluster has no GPU; set it to "auto" or "cpu"')
        yield


def run_sweep(sweep: SweepState, at_once: int, gpus: float | None, progress: Callable[[], None]) -> None:
    """Run all trials of a sweep on the cluster of `sweep_cluster`.

    Args:
        sweep: state that proposes the trials.
        at_once: number of simultaneous trials; 0: as many as the CPUs and GPUs allow.
        gpus: GPUs per trial in one process; None: one if the cluster has any.
        progress: called whenever a trial has ended.

    Raises:
        DataError: the sweep's folder cannot be written.
        WorkError: Ray Tune makes no progress.
    """
    run, tune_folder = sweep.plan.base.run, sweep.folder.root / RAY_FOLDER
    shutil.rmtree(tune_folder, ignore_errors=True)
    _run_to_end(sweep, TrialCallback(sweep, progress), _resources(run, gpus), at_once or _max_distributed(run))
    shutil.rmtree(tune_folder, ignore_errors=True)


def _run_to_end(sweep: SweepState, callback: TrialCallback, resources: dict[str, float], at_once: int | None) -> None:
    """Run Tune until every trial has ended.

    Tune can drop a trial without calling back, if its worker could not be used again. Such a trial continues from its
    checkpoint in another run of Tune.

    Raises:
        WorkError: a whole run of Tune ended no trial, a process that Tune itself needs was lost, or a file cannot be
            read or written.
    """
    while True:
        ended_before = len(sweep.ended)
        try:
            _tuner(sweep, callback, resources, at_once).fit()
        except (RayError, tune.TuneError, RuntimeError, OSError, EOFError) as error:  # the last two: a full disk
            if callback.error is None:
                raise WorkError(f"Ray Tune failed: {failure_reason(error)}; continue with --resume") from error
        if callback.error is not None:
            raise callback.error
        if not sweep.running:
            return
        if len(sweep.ended) == ended_before:
            raise WorkError(f"Ray Tune dropped trials {sorted(sweep.running)} and ended none; continue with --resume")
        sweep.requeue_running()


def _tuner(sweep: SweepState, callback: TrialCallback, resources: dict[str, float], at_once: int | None) -> Any:
    return tune.Tuner(
        tune.with_resources(run_trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=SweepSearcher(callback),
            scheduler=make_scheduler(sweep),
            num_samples=-1,
            max_concurrent_trials=at_once,
            # A distributed trial that is stopped early still waits for its workers; only ending its process frees them.
            reuse_actors=sweep.plan.base.run.engine == "local",
        ),
        run_config=tune.RunConfig(
            name=RAY_FOLDER,
            storage_path=str(sweep.folder.root),
            stop=SweepStopper(callback),
            failure_config=tune.FailureConfig(max_failures=sweep.plan.base.run.max_failures),
            callbacks=[callback],
            verbose=0,
        ),
    )


def _resources(run: RunSettings, gpus: float | None) -> dict[str, float]:
    """Resources of one trial; those of distributed trials are requested by their workers."""
    if run.engine == "ray":
        return {"CPU": DRIVER_CPUS}
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) and run.device != "cpu" else 0.0
    return {"CPU": run.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


def _max_distributed(run: RunSettings) -> int | None:
    """Number of distributed trials for which there are workers; None for trials in one process.

    Ray Train would start more trials, and each would wait forever for the workers that the others hold.
    """
    if run.engine == "local":
        return None
    resources = ray.cluster_resources()
    limits = [resources["CPU"] // (run.workers * run.cpus_per_worker)]
    if run.device != "cpu" and resources.get("GPU"):
        limits.append(resources["GPU"] // run.workers)
    return max(1, int(min(limits)))


def make_scheduler(sweep: SweepState) -> TrialScheduler:
    """ASHA over meta-training steps, informed of all trials that have ended; or a scheduler that stops none."""
    if sweep.plan.scheduler == "none":
        return FIFOScheduler()
    scheduler = AsyncHyperBandScheduler(
        time_attr="step",
        metric="accuracy",
        mode="max",
        grace_period=sweep.plan.base.validation.every,
        # ASHA stops a trial that reaches `max_t` before the trial itself can finish.
        max_t=UNREACHABLE_STEP,
        reduction_factor=REDUCTION,
    )
    for trial in sweep.ended.values():
        ended = SimpleNamespace(trial_id=f"ended-{trial.number}")
        if trial.curve:
            scheduler.on_trial_add(None, ended)
            for point in trial.curve:
                scheduler.on_trial_result(None, ended, {"step": point.step, "accuracy": point.accuracy})
            scheduler.on_trial_remove(None, ended)
    return scheduler


class TrialCallback(tune.Callback):
    """Records the end of each trial. An error here is stored and ends the sweep: Tune would blame the trial for it."""

    def __init__(self, sweep: SweepState, progress: Callable[[], None]) -> None:
        self.sweep, self.progress = sweep, progress
        self.error: Exception | None = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that finished, failed or was stopped."""
        self._end_trial(trial, 0, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial whose process was lost too often."""
        self._end_trial(trial, trial.num_failures, _last_error_line(trial))

    def _end_trial(self, trial: Any, failures: int, cause: str) -> None:
        if self.error is not None:
            return  # the trial was stopped by the end of the sweep, so a resume continues it
        try:
            self.sweep.end_trial(trial.config["number"], failures, cause)
            self.progress()
        except Exception as error:
            self.error = error


class SweepSearcher(Searcher):
    """Gives Tune the trials that `SweepState` proposes."""

    def __init__(self, callback: TrialCallback) -> None:
        super().__init__()
        self.callback = callback

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial, as `run_trial` takes it."""
        sweep = self.callback.sweep
        try:
            number = None if self.callback.error else sweep.next_trial()
        except Exception as error:
            self.callback.error, number = error, None
        if number is None:
            return Searcher.FINISHED
        folder = str(sweep.folder.trial_folder(number))
        data = {"data": sweep.dataset.uri, "fingerprint": sweep.dataset.fingerprint}
        return {"number": number, "folder": folder, "task": sweep.plan.task, **data}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `TrialCallback` records the end of a trial."""

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file, which Tune requires. The state is in the sweep's folder."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")


class SweepStopper(tune.Stopper):
    """Stops each trial at its next validation after the deadline, and all trials after an error of the sweep.

    An error that no settings have caused, such as a full disk, is one of the sweep: every trial would fail.
    """

    def __init__(self, callback: TrialCallback) -> None:
        self.callback = callback

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        sweep = self.callback.sweep
        if OUTSIDE in result:
            reason = f"trial {result['config']['number']}: {result[OUTSIDE]}"
            self.callback.error = WorkError(reason if "--resume" in reason else f"{reason}; continue with --resume")
            return True
        if not sweep.is_out_of_time():
            return False
        sweep.timed_out.add(result["config"]["number"])
        return True

    def stop_all(self) -> bool:
        """Whether all trials must stop."""
        return self.callback.error is not None


def _last_error_line(trial: Any) -> str:
    """Why Ray lost the process of a trial, at most 200 characters."""
    error = trial.get_error()
    return failure_reason(error)[:200] if error else ""
