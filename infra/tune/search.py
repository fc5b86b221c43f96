"""What a sweep tries next: random, grid, or Optuna's tree-structured Parzen estimator (TPE).

A proposal is a function of the sweep's seed, its number, and (TPE) what was told before. Nothing of it needs to be
kept: a resumed sweep draws on as if it had never stopped, and TPE is told again what the table of trials holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from metagmvae.configs.dimensions import Choice, Dimension, IntegerRange, LogUniform, Uniform, Value
from metagmvae.configs.load import SettingsError
from metagmvae.configs.search_space import Space
from metagmvae.evaluation.sweeps.trials import Trial
from metagmvae.pipelines.rng import keyed_rng

Search = Literal["random", "grid", "tpe"]
Values = dict[str, Value]
optuna.logging.set_verbosity(optuna.logging.WARNING)


class SearchMethod(Protocol):
    """Draws values for all settings of a space."""

    def draw(self, number: int) -> Values | None:
        """The proposal of that number; None: there are no more."""

    def take(self, number: int, values: Values) -> None:
        """That proposal is going to be tried."""

    def forget(self, number: int) -> None:
        """That proposal is not going to be tried."""

    def tell(self, trial: Trial) -> None:
        """How a proposal ended."""


def search_method(
    search: Search, space: Space, seed: int, interrupted: Mapping[int, Values], ended: Iterable[Trial]
) -> SearchMethod:
    """Make a proposer that knows the past of the sweep.

    Args:
        search: which.
        space: what is varied.
        seed: of the sweep.
        interrupted: trials that were proposed and have not ended.
        ended: trials that have.

    Raises:
        SettingsError: a grid over infinitely many values.
    """
    if search == "grid":
        return GridSearch(space, seed)
    if search == "random":
        return RandomSearch(space, seed)
    made = TpeSearch(space, seed)
    for trial in ended:
        made.tell(trial)
    for number, values in interrupted.items():
        made.take(number, values)
    return made


class _StatelessSearch:
    """A proposal is a function of its number alone: there is nothing to keep of one, and nothing to learn."""

    def take(self, number: int, values: Values) -> None:
        """Nothing to remember."""

    def forget(self, number: int) -> None:
        """Nothing to forget."""

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""


class GridSearch(_StatelessSearch):
    """Every combination once, in an order that the seed decides: a grid that is stopped early is a random sample."""

    def __init__(self, space: Space, seed: int) -> None:
        self.names = [dimension.name for dimension in space.dimensions]
        self.axes = [_axis(dimension) for dimension in space.dimensions]
        self.size = math.prod(len(axis) for axis in self.axes)
        self.order = keyed_rng("tune-grid", seed).permutation(self.size)

    def draw(self, number: int) -> Values | None:
        if number >= self.size:
            return None
        places = np.unravel_index(int(self.order[number]), [len(axis) for axis in self.axes])
        return {name: axis[int(i)] for name, axis, i in zip(self.names, self.axes, places, strict=True)}


class RandomSearch(_StatelessSearch):
    """Each draw by itself, by Optuna's random sampler."""

    def __init__(self, space: Space, seed: int) -> None:
        self.distributions = _distributions(space)
        self.seed = seed

    def draw(self, number: int) -> Values:
        sampler = optuna.samplers.RandomSampler(_seed(self.seed, number))
        # A study of its own: what is drawn here depends on nothing that was drawn before, and nothing piles up.
        return dict(optuna.create_study(sampler=sampler).ask(self.distributions).params)


class TpeSearch:
    """Draws near what did well, by Optuna's TPE."""

    def __init__(self, space: Space, seed: int) -> None:
        self.distributions = _distributions(space)
        self.seed = seed
        self.study = optuna.create_study(direction="maximize")
        self._open: dict[int, optuna.trial.Trial] = {}

    def draw(self, number: int) -> Values:
        # A sampler that is kept would draw the same again after every resume; `constant_liar` lets those that run
        # count as bad, so that draws at the same time are not all alike.
        self.study.sampler = optuna.samplers.TPESampler(seed=_seed(self.seed, number), constant_liar=True)
        self._open[number] = self.study.ask(self.distributions)
        return dict(self._open[number].params)

    def take(self, number: int, values: Values) -> None:
        """Where it was drawn before a resume, Optuna is made to draw just these values."""
        if number not in self._open:
            self.study.enqueue_trial(values)
            self._open[number] = self.study.ask(self.distributions)

    def forget(self, number: int) -> None:
        self.study.tell(self._open.pop(number), state=TrialState.FAIL)

    def tell(self, trial: Trial) -> None:
        """An early stop counts by where it came to, below all that went to the end; what was impossible or failed
        counts as the worst there is, so that TPE keeps away from there."""
        told: dict[str, Any] = {"value": 0.0, "state": TrialState.COMPLETE}
        steps: dict[int, float] = {}
        if trial.last is not None and trial.status == "finished":
            told["value"] = trial.last.accuracy
        elif trial.last is not None and trial.status == "stopped":
            told = {"state": TrialState.PRUNED}
            steps = {point.step: point.accuracy for point in trial.curve}
        known = self._open.pop(trial.number, None)
        if known is None:
            made_of = {"params": dict(trial.settings), "distributions": self.distributions}
            self.study.add_trial(optuna.trial.create_trial(**told, **made_of, intermediate_values=steps))
            return
        for step, accuracy in steps.items():
            known.report(accuracy, step)
        self.study.tell(known, told.get("value"), state=told["state"])


def _axis(dimension: Dimension) -> tuple[Value, ...]:
    if not dimension.levels:
        raise SettingsError(
            f"{dimension.name}: a grid needs a list of values, and {dimension.kind} is not one; write it as choice, or "
            "use --search random or tpe"
        )
    return tuple(dimension.levels)


def _seed(sweep: int, number: int) -> int:
    return int(keyed_rng("tune", sweep, number).integers(2**31))


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {dimension.name: _distribution(dimension) for dimension in space.dimensions}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, IntegerRange):
        # Optuna warns unless the upper end is one of the values.
        return IntDistribution(dimension.low, dimension.levels[-1], step=dimension.step)
    assert isinstance(dimension, Uniform | LogUniform)
    return FloatDistribution(dimension.low, dimension.high, log=isinstance(dimension, LogUniform))


def key_of(values: Values) -> str:
    """Equal for equal values."""
    return json.dumps(values, sort_keys=True)
