"""Selects the trials of a sweep that can be compared, ranks them, and averages them over the values of each setting.

A scheduler that stops trials early gives them different budgets, and chooses the budget by accuracy. The accuracy at
which a trial was stopped therefore depends on its budget as much as on its settings. Settings are compared at the
largest step that nearly all trials have reached (with ASHA, the first rung), where none had been stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from metagmvae.configs.dimensions import Dimension, Value, format_value
from metagmvae.evaluation.fewshot.paired import across_seeds
from metagmvae.evaluation.sweeps.record import SweepRecord
from metagmvae.evaluation.sweeps.trials import Trial

MIN_REACHED = 0.9
"""Fraction of trials that must have reached the common step. If all were required, a single trial that the time limit
cut off would lower the step for every trial."""
MIN_RANKED = 8
"""No rank correlation is computed for fewer trials."""
PARTS = 4
"""Number of equal parts of the scale in which a setting with many values is shown."""


@dataclass(frozen=True)
class TrialsAtStep:
    """Trials compared at equal budgets."""

    step: int
    """Training steps; 0 without trials."""
    trials: tuple[Trial, ...]
    accuracy: np.ndarray
    """(trials,), fractions in [0, 1] at that step."""
    ci95: np.ndarray
    """(trials,), half-widths of the 95% confidence intervals over episodes; NaN for a single episode."""
    left_out: int
    """Number of trials that were validated but ended before that step."""


@dataclass(frozen=True)
class TrialGroup:
    """The trials with one value of a setting, or with values in one part of its range."""

    value: Value | tuple[Value, Value]
    """The value, or the ends of the part."""
    trials: int
    mean: float
    ci95: float | None
    """Half-width of the 95% confidence interval of the mean (Student's t); None for a single trial."""

    @property
    def label(self) -> str:
        """The value or the range as text."""
        if isinstance(self.value, tuple):
            return f"{format_value(self.value[0])} to {format_value(self.value[1])}"
        return format_value(self.value)


def trials_at_common_step(trials: Sequence[Trial]) -> TrialsAtStep:
    """Select the finished and stopped trials that reached the largest step that nearly all of them have reached.

    Failed trials are left out.
    """
    validated = [trial for trial in trials if trial.status in ("finished", "stopped") and trial.curve]
    if not validated:
        return TrialsAtStep(0, (), np.empty(0), np.empty(0), 0)
    last_steps = np.array([trial.curve[-1].step for trial in validated])
    reached = [int(step) for step in np.unique(last_steps) if np.mean(last_steps >= step) >= MIN_REACHED]
    step = max(reached, default=int(last_steps.min()))
    kept = [trial for trial in validated if trial.curve[-1].step >= step]
    values = np.array([_interpolate(trial, step) for trial in kept])
    return TrialsAtStep(step, tuple(kept), values[:, 0], values[:, 1], len(validated) - len(kept))


def _interpolate(trial: Trial, step: int) -> tuple[float, float]:
    """Accuracy and its interval at a step, interpolated linearly between validations."""
    steps = [point.step for point in trial.curve]
    accuracy = [point.accuracy for point in trial.curve]
    ci95 = [math.nan if point.ci95 is None else point.ci95 for point in trial.curve]
    return float(np.interp(step, steps, accuracy)), float(np.interp(step, steps, ci95))


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The finished trial with the highest latest accuracy; if none has finished, the best of the others.

    A trial that was stopped early had a smaller budget and is not compared with finished ones. Of equal trials the
    first is returned, and None if no trial has an accuracy.
    """
    validated = [trial for trial in trials if trial.curve]
    candidates = [trial for trial in validated if trial.status == "finished"] or validated
    return max(candidates, key=lambda trial: trial.curve[-1].accuracy, default=None)


def rank_correlation(compared: TrialsAtStep) -> tuple[float | None, int]:
    """Spearman's correlation between accuracy at the common step and at the end, and the number of finished trials.

    The correlation is None with fewer than MIN_RANKED finished trials, if all accuracies are equal, or if the common
    step is the last one.
    """
    rows = [row for row, trial in enumerate(compared.trials) if trial.status == "finished"]
    early, late = compared.accuracy[rows], np.array([compared.trials[row].curve[-1].accuracy for row in rows])
    if len(rows) < MIN_RANKED or np.array_equal(early, late) or not np.ptp(early) or not np.ptp(late):
        return None, len(rows)
    return float(spearmanr(early, late).statistic), len(rows)


def group_trials(sweep: SweepRecord, compared: TrialsAtStep) -> dict[str, list[TrialGroup]]:
    """Mean accuracy for each value, or each part of the range, of every setting. Values without trials are left out."""
    positions = sweep.positions(compared.trials)
    return {
        dimension.name: _groups(dimension, positions[:, column], compared.accuracy)
        for column, dimension in enumerate(sweep.dimensions)
    }


def part_count(dimension: Dimension) -> int:
    """Number of parts in which a setting is shown."""
    return len(dimension.levels) if dimension.is_listed else PARTS


def part_indices(dimension: Dimension, positions: np.ndarray) -> np.ndarray:
    """Index of the part that contains each position, int64 (trials,)."""
    parts = part_count(dimension)
    return np.minimum((positions * parts).astype(int), parts - 1)


def _groups(dimension: Dimension, positions: np.ndarray, accuracy: np.ndarray) -> list[TrialGroup]:
    indices, groups = part_indices(dimension, positions), []
    for part in range(part_count(dimension)):
        inside = accuracy[indices == part]
        if inside.size:
            mean, ci95 = across_seeds(inside) if inside.size > 1 else (float(inside[0]), None)
            groups.append(TrialGroup(_part_value(dimension, part), inside.size, mean, ci95))
    return groups


def _part_value(dimension: Dimension, part: int) -> Value | tuple[Value, Value]:
    levels, parts = dimension.levels, part_count(dimension)
    if dimension.is_listed:
        return levels[part]
    if levels:  # a long integer range: the integers whose position lies in the part
        first, after = (math.ceil(end * len(levels) / parts - 0.5) for end in (part, part + 1))
        return levels[first], levels[after - 1]
    return dimension.value_at(part / parts), dimension.value_at((part + 1) / parts)
