"""A sweep in MLflow: a parent run, its trials as children, written while it goes on.

The driver writes, from the sweep's folder and in batches: a trial costs three requests, whatever its length. The
folder is the truth: `sweep-tracking.json` notes what a store has got, after it has got it. A server that is away is
named once on stderr, tried again at every interval, and sent the rest by `metagmvae track SWEEP_DIR` or a resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from configs.schema import TrackingSettings
from evaluation.trials import Trial

if TYPE_CHECKING:
    from infra.tune_sweep import Sweep


class SweepTracker:
    def __init__(self, sweep: Sweep, tracking: TrackingSettings) -> None: ...
    def __enter__(self) -> SweepTracker:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...
    def close(self) -> None: ...
    def with_runs(self, trials: Iterable[Trial]) -> list[Trial]:
        return list(trials)
