"""`metagmvae bench tune`: what a sweep costs beside its training, and whether that grows along it."""

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
"""Of a sweep, for its curves."""
RunSweep = Callable[[int, bool, Callable[[], None]], Sequence[Trial]]
"""(trials, whether they go to MLflow, called when one has ended) -> the trials."""


@dataclass(frozen=True)
class Sample:
    """When a trial ended."""

    at: float
    """Seconds, of a clock without a beginning."""
    driver: int
    """Resident bytes of this process."""
    workers: int
    """Resident bytes of Ray's workers that run trials."""


def bench_tune(run: RunSweep, trials: int) -> dict[str, Any]:
    """Run a sweep of short trials in MLflow, and a quarter of it without MLflow.

    Args:
        run: runs a sweep.
        trials: of the larger one, 40 or more, so that a tenth of them is more than a few.
    """
    without = _measured(run, max(PARTS, trials // 4), tracked=False)
    tracked = _measured(run, trials, tracked=True)
    return {
        "trials": trials,
        "at_once": os.cpu_count(),
        "seconds_per_trial": tracked["seconds_per_trial"],
        "seconds_per_trial_without_mlflow": without["seconds_per_trial"],
        "training_s_per_trial": tracked["training_s"],
        "waiting_s_per_trial": tracked["waiting_s"],
        "growth": tracked["growth"],
        "rows": tracked["rows"],
    }


def _measured(run: RunSweep, trials: int, *, tracked: bool) -> dict[str, Any]:
    samples: list[Sample] = []
    ended = run(trials, tracked, lambda: samples.append(_sample()))
    done = [trial for trial in ended if trial.last is not None]
    training = [trial.last.seconds for trial in done if trial.last is not None]
    rows = _rows(samples)
    quarter = max(1, len(rows) // 4)
    early, late = rows[quarter : 2 * quarter + 1], rows[-quarter - 1 :]
    return {
        # The first tenth starts workers and opens the store.
        "seconds_per_trial": statistics.mean(row["seconds_per_trial"] for row in rows[1:]),
        "training_s": statistics.median(training),
        "waiting_s": statistics.median(t.seconds - own for t, own in zip(done, training, strict=True)),
        "growth": {
            name: statistics.mean(row[name] for row in late) / statistics.mean(row[name] for row in early)
            for name in ("seconds_per_trial", "driver_mib", "workers_mib")
        },
        "rows": rows,
    }


def _sample() -> Sample:
    return Sample(time.perf_counter(), current_rss(), ray_worker_rss(descendants=True))


def _rows(samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Means over each tenth of the sweep."""
    rows = []
    for part in range(PARTS):
        first, last = part * len(samples) // PARTS, (part + 1) * len(samples) // PARTS
        some = samples[max(0, first - 1) : last]
        rows.append(
            {
                "trials": last,
                "seconds_per_trial": (some[-1].at - some[0].at) / max(1, len(some) - 1),
                "driver_mib": statistics.mean(sample.driver for sample in some) / MIB,
                "workers_mib": statistics.mean(sample.workers for sample in some) / MIB,
            }
        )
    return rows
