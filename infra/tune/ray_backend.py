"""Ray Tune runs the trials of a sweep: places them, stops them early, replaces lost workers.

Nothing that a sweep needs to go on is left to Tune. Its own restoring wants the very objects of before, does not take
what our table says, and was never proven with Optuna; so a resumed sweep is a new run of Tune whose searcher hands
out the unfinished trials first, and whose scheduler is told the curves of all that have ended.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from metagmvae.configs.schema import RunSettings, Settings
from metagmvae.infra.cluster.connect import cluster
from metagmvae.infra.tune.sweep_state import SweepState
from metagmvae.infra.tune.trial import run_trial

FOLDER = "ray"
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Its state is written again and again, larger with each trial, and nobody ever reads it.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}
REDUCTION = 3
"""ASHA: one of so many goes on at each rung; rungs are so many times further apart."""
NEVER = 10**9
"""Steps."""
DRIVER_CPUS = 0.01
"""Of a trial that only waits for its workers."""


@contextmanager
def sweep_cluster(base: Settings, at_once: int) -> Iterator[None]:
    """The cluster that a sweep runs on, joined or started.

    Args:
        base: settings that trials have in common.
        at_once: trials; 0: as many as there are CPUs and GPUs for.

    Raises:
        SettingsError: it cannot be reached, is too small, or lacks what trials on several workers need.
    """
    run = base.run
    distributed = run.engine == "ray"
    each = run.cpus_per_worker * (run.workers if distributed else 1)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # A trial that only waits for its workers takes a hundredth of a CPU, so there must be a whole one more.
    wanted = each * max(at_once, 1) + int(distributed)
    # Ray and Tune talk of every trial on standard output, where the answer stands, however little they are asked to;
    # what they have to say of a trial that failed is in the table.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet), cluster(run.address, wanted, dashboard=distributed):
        yield


def run_sweep(sweep: SweepState, at_once: int, gpus: float | None, progress: Callable[[], None]) -> None:
    """Run a sweep to its end, on the cluster of `sweep_cluster`.

    Args:
        sweep: what to try.
        at_once: trials; 0: as many as there are CPUs and GPUs for.
        gpus: of a trial in one process; None: one where the cluster has any.
        progress: called whenever a trial has ended.

    Raises:
        DataError: the sweep's folder cannot be written any more.
        RuntimeError: Tune does not get on.
    """
    run, state = sweep.plan.base.run, sweep.folder.root / FOLDER
    shutil.rmtree(state, ignore_errors=True)
    _to_the_end(sweep, TrialCallback(sweep, progress), _resources(run, gpus), at_once or _limit(run))
    shutil.rmtree(state, ignore_errors=True)


def _to_the_end(sweep: SweepState, course: TrialCallback, resources: dict[str, float], at_once: int | None) -> None:
    """Run Tune until every trial has ended: it can drop one without telling its callbacks (a worker that could not be
    used again), which then goes on in another run of Tune, from its checkpoint.

    Raises:
        RuntimeError: a whole run of Tune ended no trial.
    """
    while True:
        before = len(sweep.ended)
        _tuner(sweep, course, resources, at_once).fit()
        if course.error is not None:
            raise course.error
        if not sweep.running:
            return
        if len(sweep.ended) == before:
            raise RuntimeError(f"Ray Tune ended no trial and dropped {sorted(sweep.running)}; go on with --resume")
        sweep.take_back()


def _tuner(sweep: SweepState, course: TrialCallback, resources: dict[str, float], at_once: int | None) -> Any:
    return tune.Tuner(
        tune.with_resources(run_trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=SweepSearcher(course),
            scheduler=scheduler(sweep),
            num_samples=-1,
            max_concurrent_trials=at_once,
            # A distributed trial that is stopped early still waits for its workers: only its death frees them.
            reuse_actors=sweep.plan.base.run.engine == "local",
        ),
        run_config=tune.RunConfig(
            name=FOLDER,
            storage_path=str(sweep.folder.root),
            stop=TimeLimit(course),
            failure_config=tune.FailureConfig(max_failures=sweep.plan.base.run.max_failures),
            callbacks=[course],
            verbose=0,
        ),
    )


def _resources(run: RunSettings, gpus: float | None) -> dict[str, float]:
    if run.engine == "ray":
        return {"CPU": DRIVER_CPUS}
    there = ray.cluster_resources().get("GPU", 0)
    share = (1.0 if there and run.device != "cpu" else 0.0) if gpus is None else gpus
    return {"CPU": run.cpus_per_worker, **({"GPU": share} if share else {})}


def _limit(run: RunSettings) -> int | None:
    """Trials at once where each is placed by Ray Train, which would wait for ever with half of its workers."""
    if run.engine == "local":
        return None
    there = ray.cluster_resources()
    places = [there["CPU"] // (run.workers * run.cpus_per_worker)]
    if run.device != "cpu" and there.get("GPU"):
        places.append(there["GPU"] // run.workers)
    return max(1, int(min(places)))


def scheduler(sweep: SweepState) -> TrialScheduler:
    """ASHA over steps of meta-training, told of all trials that have ended; or none."""
    if sweep.plan.scheduler == "none":
        return FIFOScheduler()
    settings: Settings = sweep.plan.base
    made = AsyncHyperBandScheduler(
        time_attr="step",
        metric="accuracy",
        mode="max",
        grace_period=settings.validation.every,
        # A trial that reaches this is stopped before it can come to its end by itself.
        max_t=NEVER,
        reduction_factor=REDUCTION,
    )
    for trial in sweep.ended.values():
        known = SimpleNamespace(trial_id=f"ended-{trial.number}")
        if trial.curve:
            made.on_trial_add(None, known)
            for point in trial.curve:
                made.on_trial_result(None, known, {"step": point.step, "accuracy": point.accuracy})
            made.on_trial_remove(None, known)
    return made


class TrialCallback(tune.Callback):
    """Takes down what becomes of trials. An error in it ends the sweep; Tune would count it against the trial."""

    def __init__(self, sweep: SweepState, progress: Callable[[], None]) -> None:
        self.sweep, self.progress = sweep, progress
        self.error: Exception | None = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, 0, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, trial.num_failures, _why(trial))

    def _end(self, trial: Any, died: int, why: str) -> None:
        try:
            self.sweep.has_ended(trial.config["number"], died, why)
            self.progress()
        except Exception as error:
            self.error = error


class SweepSearcher(Searcher):
    """Hands the sweep's trials to Tune."""

    def __init__(self, course: TrialCallback) -> None:
        super().__init__()
        self.course = course

    def suggest(self, trial_id: str) -> Any:
        sweep = self.course.sweep
        try:
            number = None if self.course.error else sweep.next()
        except Exception as error:
            self.course.error, number = error, None
        if number is None:
            return Searcher.FINISHED
        folder = str(sweep.folder.folder(number))
        return {"number": number, "folder": folder, "data": sweep.dataset.uri, "task": sweep.plan.task}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """`TrialCallback` hears of it, and of more."""

    def save(self, checkpoint_path: str) -> None:
        """The sweep's folder is what lasts."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")


class TimeLimit(tune.Stopper):
    """Stops a trial at its next validation when the hours are up, and all of them when the sweep cannot go on."""

    def __init__(self, course: TrialCallback) -> None:
        self.course = course

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        sweep = self.course.sweep
        if not sweep.is_late():
            return False
        sweep.late.add(result["config"]["number"])
        return True

    def stop_all(self) -> bool:
        return self.course.error is not None


def _why(trial: Any) -> str:
    """The last line of what Ray says of a trial whose process was lost."""
    lines = [line.strip() for line in str(trial.get_error() or "").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]
