"""`metagmvae bench tune`: wall time and memory per trial of a sweep, and their growth with the number of trials."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metagmvae.evaluation.bench.memory import current_rss, ray_worker_rss
from metagmvae.evaluation.sweeps.trials import Trial

MIB = 2**20
PARTS = 10
"""Number of equal parts of the sweep, one row of the result each."""
RunSweep = Callable[[int, bool, Callable[[], None]], Sequence[Trial]]
"""Runs a sweep: (number of trials, whether to track it in MLflow, called when a trial has ended) -> the trials."""


@dataclass(frozen=True)
class Sample:
    """Time and memory when a trial ended."""

    time: float
    """Seconds of `time.perf_counter`."""
    driver: int
    """Resident bytes of this process."""
    workers: int
    """Resident bytes of the Ray workers that run trials."""

    @classmethod
    def now(cls) -> Sample:
        """Sample this moment."""
        return cls(time.perf_counter(), current_rss(), ray_worker_rss(descendants=True))


def bench_tune(run: RunSweep, trials: int) -> dict[str, Any]:
    """Time a sweep of short trials with MLflow tracking, and a sweep of a quarter of the size without.

    Args:
        run: runs a sweep.
        trials: of the larger sweep; 40 or more, so that each of the ten parts has several.
    """
    untracked = _measure(run, max(PARTS, trials // 4), tracked=False)
    tracked = _measure(run, trials, tracked=True)
    return {
        "trials": trials,
        "at_once": os.cpu_count(),
        "seconds_per_trial": tracked["seconds_per_trial"],
        "seconds_per_trial_without_mlflow": untracked["seconds_per_trial"],
        "training_s_per_trial": tracked["training_s"],
        "waiting_s_per_trial": tracked["waiting_s"],
        "growth": tracked["growth"],
        "rows": tracked["rows"],
    }


def _measure(run: RunSweep, trials: int, *, tracked: bool) -> dict[str, Any]:
    samples: list[Sample] = []
    ended = run(trials, tracked, lambda: samples.append(Sample.now()))
    validated = [trial for trial in ended if trial.curve]
    training = [trial.curve[-1].seconds for trial in validated]
    rows = _rows(samples)
    quarter = max(1, len(rows) // 4)
    early, late = rows[quarter : 2 * quarter + 1], rows[-quarter - 1 :]
    return {
        # The first part also starts the workers and opens the MLflow store.
        "seconds_per_trial": statistics.mean(row["seconds_per_trial"] for row in rows[1:]),
        "training_s": statistics.median(training),
        "waiting_s": statistics.median(t.seconds - seconds for t, seconds in zip(validated, training, strict=True)),
        "growth": {
            name: statistics.mean(row[name] for row in late) / statistics.mean(row[name] for row in early)
            for name in ("seconds_per_trial", "driver_mib", "workers_mib")
        },
        "rows": rows,
    }


def _rows(samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Means over each part of the sweep."""
    rows = []
    for part in range(PARTS):
        first, last = part * len(samples) // PARTS, (part + 1) * len(samples) // PARTS
        inside = samples[max(0, first - 1) : last]
        rows.append(
            {
                "trials": last,
                "seconds_per_trial": (inside[-1].time - inside[0].time) / max(1, len(inside) - 1),
                "driver_mib": statistics.mean(sample.driver for sample in inside) / MIB,
                "workers_mib": statistics.mean(sample.workers for sample in inside) / MIB,
            }
        )
    return rows
