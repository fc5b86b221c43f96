"""Reads the folder of a sweep: `sweep.json` (plan and search space) and `trials.jsonl` (ended trials)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from metagmvae.configs.dimensions import Dimension, Value, parse_dimension
from metagmvae.configs.load import SettingsError, settings_from_json
from metagmvae.evaluation.sweeps.trials import TRIALS, Trial, read_trials
from metagmvae.pipelines.files import check_document, read_json
from metagmvae.pipelines.records import DataError

SWEEP = "sweep.json"


@dataclass(frozen=True)
class SweepRecord:
    """A sweep with the trials that have ended so far."""

    name: str
    task: str
    """Few-shot task whose validation accuracy ranks the trials, for example "5w1s"."""
    dimensions: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    """In the order in which they ended."""

    def positions(self, trials: Sequence[Trial]) -> np.ndarray:
        """Settings of trials on the unit cube of the search space: (trials, dimensions) in [0, 1].

        Raises:
            DataError: a trial lacks a setting or has a value outside the space.
        """
        positions = np.empty((len(trials), len(self.dimensions)))
        for column, dimension in enumerate(self.dimensions):
            cache: dict[tuple[type, Value], float] = {}  # looks up each value in a list of levels only once
            for row, trial in enumerate(trials):
                if dimension.name not in trial.settings:
                    raise DataError(
                        f"trial {trial.number} has no {dimension.name}; was {SWEEP} changed after the trials?"
                    )
                value = trial.settings[dimension.name]
                key = (type(value), value)
                if key not in cache:
                    cache[key] = _position(dimension, value)
                positions[row, column] = cache[key]
        return positions


def _position(dimension: Dimension, value: Value) -> float:
    try:
        return dimension.position(value)
    except SettingsError as error:
        raise DataError(f"{error}; was {SWEEP} changed after the trials?") from error


def is_sweep(folder: Path) -> bool:
    """Whether a folder is the folder of a sweep."""
    return (folder / SWEEP).is_file()


class _Plan(BaseModel, strict=True):
    """The keys of `sweep.json` that this program reads."""

    name: str
    task: str
    space: dict[str, Any]
    base: dict[str, Any] = {}
    """Settings that the trials have in common; older versions did not record them."""


class _PlanWithSettings(_Plan):
    """`sweep.json` as it is needed to track or compare a sweep."""

    base: dict[str, Any]
    data_fingerprint: str | None = None


def read_plan(folder: Path, *, with_settings: bool = False) -> dict[str, Any]:
    """Read and check the plan of a sweep.

    Args:
        folder: of the sweep.
        with_settings: require valid settings in `base`; a report does without.

    Raises:
        DataError: the folder holds no sweep, or its plan is invalid.
    """
    remedy = "give the folder that `metagmvae tune` wrote"
    if not (folder / SWEEP).exists():
        raise DataError(f"{folder}: no {SWEEP} there; {remedy}")
    plan: dict[str, Any] = read_json(folder / SWEEP)
    check_document(_PlanWithSettings if with_settings else _Plan, plan, folder / SWEEP, remedy)
    if with_settings:
        try:
            settings_from_json(json.dumps(plan["base"]))
        except SettingsError as error:
            raise DataError(f"{folder / SWEEP}: base: {error}; {remedy}") from error
    return plan


def read_sweep(folder: Path) -> SweepRecord:
    """Read a sweep that is running or has ended.

    Raises:
        DataError: the folder holds no sweep, or one of its files is invalid.
    """
    path, plan = folder / SWEEP, read_plan(folder)
    try:
        dimensions = tuple(parse_dimension(key, description) for key, description in plan["space"].items())
    except SettingsError as error:
        raise DataError(f"{path}: {error}") from error
    return SweepRecord(plan["name"], plan["task"], dimensions, tuple(read_trials(folder / TRIALS)))
