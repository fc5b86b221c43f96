"""Which trials of a sweep can be compared with each other, and what each value of a setting was worth.

A scheduler that stops trials early leaves them with budgets of their own: the accuracy a trial was stopped at says as
much about its budget as about its settings, and who trains on was chosen by accuracy. So settings are judged where
nobody had been stopped: at the largest step that nearly all trials have reached (with ASHA, its first rung).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from metagmvae.evaluation.fewshot.paired import across_seeds
from metagmvae.evaluation.sweeps.record import Axis, SweepRecord, shown_value
from metagmvae.evaluation.sweeps.trials import Trial, Value

REACHED = 0.9
"""Share of trials that must have come as far as the step that all are judged at. Not all of them: one trial that was
cut off by the end of the hours would move the step for everybody."""
FEWEST_RANKS = 8
"""Of fewer trials a rank correlation says nothing."""
PARTS = 4
"""A range is shown in so many equal parts of its scale."""


@dataclass(frozen=True)
class TrialsAtStep:
    """Trials at one budget."""

    step: int
    """Their training steps; 0 where there are no trials."""
    trials: tuple[Trial, ...]
    accuracy: np.ndarray
    """(trials,), shares in [0, 1] at that step."""
    ci95: np.ndarray
    """(trials,), half width of each one's interval over episodes."""
    left_out: int
    """Trials with a validation that ended before that step."""


@dataclass(frozen=True)
class TrialGroup:
    """The trials with one value of a setting, or within one part of its range."""

    value: Value | tuple[Value, Value]
    trials: int
    mean: float
    ci95: float | None
    """Half width of the 95% interval of the mean (Student's t); None of a single trial."""

    @property
    def label(self) -> str:
        """Its value or its range for people."""
        if isinstance(self.value, tuple):
            return f"{shown_value(self.value[0])} to {shown_value(self.value[1])}"
        return shown_value(self.value)

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def trials_at_common_step(trials: Sequence[Trial]) -> TrialsAtStep:
    """All finished and stopped trials at the largest step that nearly all of them have reached.

    Trials that failed are left out: where they failed early they have no accuracy, and one that they had before
    becomes no better by that.
    """
    curves = [trial for trial in trials if trial.status in ("finished", "stopped") and trial.curve]
    if not curves:
        return TrialsAtStep(0, (), np.empty(0), np.empty(0), 0)
    ends = np.array([trial.curve[-1].step for trial in curves])
    step = max((int(end) for end in np.unique(ends) if np.mean(ends >= end) >= REACHED), default=int(ends.min()))
    kept = [trial for trial in curves if trial.curve[-1].step >= step]
    values = np.array([_at(trial, step) for trial in kept])
    return TrialsAtStep(step, tuple(kept), values[:, 0], values[:, 1], len(curves) - len(kept))


def _at(trial: Trial, step: int) -> tuple[float, float]:
    """Accuracy and interval at a step, between two validations on the line between them."""
    steps = [point.step for point in trial.curve]
    accuracy, ci95 = ([getattr(point, key) for point in trial.curve] for key in ("accuracy", "ci95"))
    return float(np.interp(step, steps, accuracy)), float(np.interp(step, steps, ci95))


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The best of those that trained to the end by their newest accuracy; of all others where none did.

    A trial that was stopped early is not compared with finished ones: it had another budget. The first of equals
    counts. None: no trial has an accuracy.
    """
    judged = [trial for trial in trials if trial.curve]
    pool = [trial for trial in judged if trial.status == "finished"] or judged
    return max(pool, key=lambda trial: trial.curve[-1].accuracy, default=None)


def agreement(judged: TrialsAtStep) -> tuple[float | None, int]:
    """Spearman's rank correlation between accuracy at the common step and at the end, and over how many trials: those
    that trained to the end. None of it: fewer than FEWEST_RANKS, all equal, or that step is the end."""
    rows = [row for row, trial in enumerate(judged.trials) if trial.status == "finished"]
    early, late = judged.accuracy[rows], np.array([judged.trials[row].curve[-1].accuracy for row in rows])
    if len(rows) < FEWEST_RANKS or np.array_equal(early, late) or not np.ptp(early) or not np.ptp(late):
        return None, len(rows)
    return float(spearmanr(early, late).statistic), len(rows)


def groups(sweep: SweepRecord, judged: TrialsAtStep) -> dict[str, list[TrialGroup]]:
    """For each setting its values or the parts of its range that have trials, by rising value, with their means."""
    places = sweep.places(judged.trials)
    return {axis.name: _groups(axis, places[:, column], judged.accuracy) for column, axis in enumerate(sweep.axes)}


def parts_of(axis: Axis) -> int:
    """Parts that an axis is shown in."""
    return len(axis.levels) if axis.listed else PARTS


def _groups(axis: Axis, places: np.ndarray, accuracy: np.ndarray) -> list[TrialGroup]:
    parts = parts_of(axis)
    part_of = np.minimum((places * parts).astype(int), parts - 1)
    found = []
    for part in range(parts):
        inside = accuracy[part_of == part]
        if inside.size:
            mean, ci95 = across_seeds(inside) if inside.size > 1 else (float(inside[0]), None)
            found.append(TrialGroup(_value(axis, part, parts), inside.size, mean, ci95))
    return found


def _value(axis: Axis, part: int, parts: int) -> Value | tuple[Value, Value]:
    if axis.listed:
        return axis.levels[part]
    if axis.levels:  # a long range of whole numbers: those whose middle lies in the part
        first, after = (math.ceil(end * len(axis.levels) / parts - 0.5) for end in (part, part + 1))
        return axis.levels[first], axis.levels[after - 1]
    return axis.at(part / parts), axis.at((part + 1) / parts)
