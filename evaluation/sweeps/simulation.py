"""Sweeps that nobody trained: trials with the learning curves of a known formula, stopped early as ASHA does.

They show whether `importance` finds what is true, and what a sweep of 10,000 trials costs those who read it.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.sweeps.record import SWEEP
from metagmvae.evaluation.sweeps.trials import TRIALS, CurvePoint, Status, Trial, Value, lines_of
from metagmvae.pipelines.files import atomic_file, write_json

SPACE: dict[str, dict[str, Any]] = {
    "train.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    "train.em_iterations": {"kind": "int", "low": 1, "high": 20},
    "train.set_size": {"kind": "choice", "values": [50, 100, 200, 300]},
    "train.samples": {"kind": "choice", "values": [4, 8, 16, 32]},
    "train.decode_samples": {"kind": "choice", "values": [1, 2, 4]},
    "train.schedule": {"kind": "choice", "values": ["constant", "cosine"]},
}


@dataclass(frozen=True)
class Simulated:
    """What a simulated sweep is made with."""

    trials: int = 40
    seed: int = 0
    noise: float = 0.01
    """Standard deviation of a trial's accuracy, once for all its validations."""
    steps: int = 900
    every: int = 100
    """Steps between validations."""
    at_once: int = 8
    """Trials that run at the same time."""
    asha: bool = True
    reduction: int = 3
    failing: float = 0.0
    """Share of trials that fail half way."""


def true_accuracy(settings: Mapping[str, Value]) -> float:
    """Accuracy at the end of training: the learning rate decides, M adds, whoever has a large M may have a lower rate;
    EM iterations, N, R and the schedule do nothing."""
    decades = math.log10(float(settings["train.learning_rate"])) + 3.0
    return 0.85 - 0.25 * decades**2 + 0.08 * math.log2(float(settings["train.set_size"]) / 50) / math.log2(6)


def simulate(what: Simulated) -> list[Trial]:
    """Trials in the order in which they ended, on `at_once` places.

    A step takes a time that grows with M and R, so trials overtake each other. A trial at a rung goes on if it is among
    the best 1/reduction of those that came so far (asynchronous successive halving, Li et al. 2020).
    """
    draws = np.random.default_rng(what.seed)
    rungs = _rungs(what)
    waiting = iter(range(what.trials))
    first = [_drawn(number, draws, what) for number in islice(waiting, what.at_once)]
    running = [(trial.seconds_a_validation, trial.number, trial) for trial in first]
    heapq.heapify(running)
    ended = []
    while running:
        now, number, trial = heapq.heappop(running)
        status = trial.validated(rungs, what)
        if not status:
            heapq.heappush(running, (now + trial.seconds_a_validation, number, trial))
            continue
        ended.append(trial.ended(status))
        successor = next(waiting, None)
        if successor is not None:
            begun = _drawn(successor, draws, what)
            heapq.heappush(running, (now + begun.seconds_a_validation, successor, begun))
    return ended


def _rungs(what: Simulated) -> dict[int, list[float]]:
    """Steps at which a trial may be stopped, and the accuracies that came there."""
    rungs: dict[int, list[float]] = {}
    step = what.every
    while what.asha and step < what.steps:
        rungs[step] = []
        step *= what.reduction
    return rungs


@dataclass
class _Running:
    number: int
    settings: dict[str, Value]
    offset: float
    """Its noise."""
    fails_at: int
    """Step; beyond the last one: never."""
    seconds_a_validation: float
    points: list[CurvePoint] = field(default_factory=list)

    def validated(self, rungs: dict[int, list[float]], what: Simulated) -> Status | None:
        """Add the next validation; how the trial ends by it, None: it goes on."""
        step = what.every * (len(self.points) + 1)
        if step >= self.fails_at:
            return "failed"
        # All curves rise alike, so the order at a rung is that at the end but for the noise.
        accuracy = 0.2 + (true_accuracy(self.settings) - 0.2) * (1 - math.exp(-3 * step / what.steps)) + self.offset
        accuracy = min(max(accuracy, 0.0), 1.0)
        seconds = self.seconds_a_validation * (len(self.points) + 1)
        self.points.append(CurvePoint(step=step, accuracy=accuracy, ci95=0.012, seconds=seconds))
        if step >= what.steps:
            return "finished"
        if step in rungs:
            insort(rungs[step], accuracy)
            if accuracy < rungs[step][-math.ceil(len(rungs[step]) / what.reduction)]:
                return "stopped"
        return None

    def ended(self, status: Status) -> Trial:
        return Trial(
            number=self.number,
            settings=self.settings,
            status=status,
            reason="loss is not finite" if status == "failed" else "",
            curve=tuple(self.points),
            seconds=self.seconds_a_validation * (len(self.points) + 1) + 2.0,
        )


def _drawn(number: int, draws: np.random.Generator, what: Simulated) -> _Running:
    settings = {name: _value(about, draws) for name, about in SPACE.items()}
    fails = draws.random() < what.failing
    work = float(settings["train.set_size"]) * (8 + float(settings["train.decode_samples"]))
    seconds = 2e-3 * work * what.every / 100 * draws.uniform(0.9, 1.1)
    offset = float(draws.normal(0, what.noise))
    return _Running(number, settings, offset, what.steps // 2 if fails else what.steps + 1, seconds)


def _value(about: Mapping[str, Any], draws: np.random.Generator) -> Value:
    if about["kind"] == "choice":
        return about["values"][int(draws.integers(len(about["values"])))]
    if about["kind"] == "int":
        return int(draws.integers(about["low"], about["high"] + 1))
    return float(about["low"] * (about["high"] / about["low"]) ** draws.random())


def write_simulated(folder: Path, what: Simulated, space: Mapping[str, Any] = SPACE) -> list[Trial]:
    """A sweep folder with simulated trials; returns them."""
    trials = simulate(what)
    write_json(folder / SWEEP, {"name": folder.name, "task": "5w1s", "space": dict(space), "base": {}})
    with atomic_file(folder / TRIALS) as file:
        file.write(lines_of(trials).encode())
    return trials
