"""`metagmvae bench sweep-scale`, first half: what many trials cost the files, the report and the search of a sweep.

The trials are simulated (`sweep_simulation`): nothing of what is timed depends on how they were trained.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.sweeps.report import write_report
from metagmvae.evaluation.sweeps.simulation import SPACE, Simulated, write_simulated
from metagmvae.evaluation.sweeps.trials import TRIALS, Trial, lines_of, read_trials

ASKED = 10
"""Suggestions that are timed; the median counts."""
APPENDED = 200


def bench_files(counts: Sequence[int]) -> list[dict[str, Any]]:
    """One row a number of trials: writing, reading and reporting them, and asking TPE for the next one.

    What only calculates is told in seconds of the processor, which neighbours on the machine do not change.
    """
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"trials": count, **_files(Path(folder), count)})
    return rows


def _files(folder: Path, count: int) -> dict[str, Any]:
    trials = write_simulated(folder, Simulated(trials=count, at_once=min(count, 800), failing=0.02))
    append = _append(folder / "appended", trials)
    since = time.process_time()
    read = read_trials(folder / TRIALS)
    read_s = time.process_time() - since
    since = time.process_time()
    study = told_study(read)
    told_s = time.process_time() - since
    since = time.process_time()
    write_report(folder)
    report_s = time.process_time() - since
    return {
        "table_mb": (folder / TRIALS).stat().st_size / 1e6,
        "append_ms": 1000 * append,
        "read_cpu_s": read_s,
        "resume_cpu_s": read_s + told_s,
        "suggest_cpu_ms": 1000 * _suggest(study),
        "report_cpu_s": report_s,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _append(path: Path, trials: Sequence[Trial]) -> float:
    """Seconds that a line takes until it is on the disk; median."""
    seconds = []
    with open(path, "a", encoding="utf-8") as file:
        for trial in trials[:APPENDED]:
            since = time.perf_counter()
            file.write(lines_of([trial]))
            file.flush()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - since)
    return float(np.median(seconds))


def told_study(trials: Sequence[Trial]) -> Any:
    """A study of Optuna that knows trials, as a sweep that is resumed makes it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = distributions_of(SPACE)
    for trial in trials:
        last = trial.curve[-1].accuracy if trial.curve else 0.0
        pruned = trial.status == "stopped"
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.settings),
                distributions=distributions,
                value=None if pruned else last,
                state=optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE,
                intermediate_values={point.step: point.accuracy for point in trial.curve},
            )
        )
    return study


def distributions_of(space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A space in Optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for name, about in space.items():
        if about["kind"] == "choice":
            made[name] = CategoricalDistribution(about["values"])
        elif about["kind"] == "int":
            made[name] = IntDistribution(about["low"], about["high"])
        else:
            made[name] = FloatDistribution(about["low"], about["high"], log=about["kind"] == "loguniform")
    return made


def _suggest(study: Any) -> float:
    """Processor seconds of one suggestion by TPE; median."""
    import optuna

    distributions, seconds = distributions_of(SPACE), []
    for seed in range(ASKED):
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        since = time.process_time()
        study.ask(distributions)
        seconds.append(time.process_time() - since)
    return float(np.median(seconds))
