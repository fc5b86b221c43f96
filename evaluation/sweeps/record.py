"""A sweep as it is read: its folder, its settings as axes from 0 to 1, and which trials can be compared.

A sweep folder holds `sweep.json` (what was asked for) and `trials.jsonl` (what came of it, `evaluation.sweeps.trials`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.evaluation.sweeps.trials import TRIALS, Trial, Value, read_trials
from metagmvae.pipelines.records import DataError

SWEEP = "sweep.json"
KINDS = ("choice", "int", "uniform", "loguniform")
MOST_LEVELS = 12
"""An integer range of at most so many values is shown value by value, a longer one in parts."""


@dataclass(frozen=True)
class Axis:
    """One setting that a sweep varies, on a scale from 0 to 1 on which the search draws evenly."""

    name: str
    kind: str
    levels: Sequence[Value] = ()
    """The values of a choice or of an integer range, each an equal part of the scale; empty: a real range."""
    low: float = 0.0
    high: float = 1.0

    @property
    def short(self) -> str:
        """Its name without the section."""
        return self.name.rpartition(".")[2]

    @property
    def listed(self) -> bool:
        """Whether it is shown value by value."""
        return 0 < len(self.levels) <= MOST_LEVELS

    def unit(self, value: Value) -> float:
        """Place of a value in [0, 1]: of a level, the middle of its part.

        Raises:
            DataError: not a value of this axis.
        """
        if self.levels:
            place = self._place(value)
            if place is not None:
                return (place + 0.5) / len(self.levels)
        elif not isinstance(value, str) and self.low <= value <= self.high:
            if self.kind == "loguniform":
                return math.log(value / self.low) / math.log(self.high / self.low)
            return (value - self.low) / (self.high - self.low)
        raise DataError(f"{self.name}: {value!r} is not in the space; was sweep.json changed after its trials?")

    def _place(self, value: Value) -> int | None:
        if isinstance(self.levels, range):
            return self.levels.index(int(value)) if not isinstance(value, str) and value in self.levels else None
        # True equals 1 in Python, and a choice may offer both; 1 and 1.0 are the same setting.
        same = (
            place
            for place, level in enumerate(self.levels)
            if level == value and isinstance(level, bool) == isinstance(value, bool)
        )
        return next(same, None)

    def at(self, place: float) -> float:
        """The number at a place in [0, 1] of a real range."""
        if self.kind == "loguniform":
            return self.low * (self.high / self.low) ** place
        return self.low + place * (self.high - self.low)

    def ticks(self) -> tuple[list[float], list[str]]:
        """Places and texts that a picture labels this axis with."""
        if self.levels:
            last = len(self.levels) - 1
            count = last + 1 if self.listed else 6
            shown = [self.levels[round(last * place / (count - 1))] for place in range(count)] if last else self.levels
            return [self.unit(level) for level in shown], [shown_value(level) for level in shown]
        places = [0.0, 0.25, 0.5, 0.75, 1.0]
        if self.kind == "loguniform":
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(powers) >= 3:
                every = math.ceil(len(powers) / 6)
                places = [self.unit(min(max(10.0**power, self.low), self.high)) for power in powers][::every]
        return places, [shown_value(self.at(place)) for place in places]


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, as far as it has come."""

    name: str
    task: str
    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]
    """In the order in which they ended."""

    def places(self, trials: Sequence[Trial]) -> np.ndarray:
        """Settings of trials on the axes: (trials, axes) in [0, 1].

        Raises:
            DataError: a trial lacks a setting or has a value outside the space.
        """
        places = np.empty((len(trials), len(self.axes)))
        for column, axis in enumerate(self.axes):
            known: dict[tuple[type, Value], float] = {}  # a list of levels is searched once for each of them
            for row, trial in enumerate(trials):
                if axis.name not in trial.settings:
                    raise DataError(
                        f"trial {trial.number} has no {axis.name}; was sweep.json changed after its trials?"
                    )
                value = trial.settings[axis.name]
                key = (type(value), value)
                if key not in known:
                    known[key] = axis.unit(value)
                places[row, column] = known[key]
        return places


def shown_value(value: Value) -> str:
    """A value for people: three digits of a number, everything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """Read a sweep, running or ended.

    Raises:
        DataError: no sweep there, or a file of it is not what it should be.
    """
    path = folder / SWEEP
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        name, task, space = str(about["name"]), str(about["task"]), dict(about["space"].items())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name the folder that `metagmvae tune` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a sweep ({type(error).__name__}: {error})") from error
    try:
        axes = axes_of(space)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return SweepRecord(name, task, axes, tuple(read_trials(folder / TRIALS)))


def axes_of(space: Mapping[str, Mapping[str, Any]]) -> tuple[Axis, ...]:
    """The settings of a space, as `sweep.json` describes them.

    Raises:
        DataError: one of them is not a setting that can be varied.
    """
    return tuple(_axis(name, about) for name, about in space.items())


def _axis(name: str, about: Mapping[str, Any]) -> Axis:
    try:
        kind = about["kind"]
        if kind == "choice":
            levels = tuple(about["values"])
            if not levels:
                raise ValueError("no values")
            return Axis(name, kind, levels)
        low, high, step = float(about["low"]), float(about["high"]), int(about.get("step", 1))
        if kind not in KINDS or not low < high or (kind == "loguniform" and low <= 0) or step < 1:
            raise ValueError(f"{kind} from {low:g} to {high:g}")
        if kind == "int":
            return Axis(name, kind, range(int(low), int(high) + 1, step))
        return Axis(name, kind, (), low, high)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"space of {name}: {error}; kinds are {', '.join(KINDS)}") from error
