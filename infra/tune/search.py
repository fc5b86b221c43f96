"""Search methods of a sweep: random, grid, and Optuna's tree-structured Parzen estimator (TPE).

A proposal depends only on the sweep's seed, the number of the proposal and, for TPE, on the results accepted so far.
The state of a search is therefore never stored: a resumed sweep rebuilds it from the table of trials and continues with
the same proposals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
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
MAX_GRID = 10**6
"""Combinations of a grid; their shuffled order is kept in memory."""
optuna.logging.set_verbosity(optuna.logging.WARNING)


class SearchMethod(Protocol):
    """Proposes values for all settings of a search space."""

    def ask(self, number: int) -> Values | None:
        """Return proposal `number`, or None if there are no more. `accept` or `discard` must follow."""

    def accept(self, number: int, values: Values) -> None:
        """Record that a trial with this proposal will run."""

    def discard(self, number: int) -> None:
        """Record that no trial with this proposal will run."""

    def tell(self, trial: Trial) -> None:
        """Record the result of a trial."""


def search_method(
    search: Search, space: Space, seed: int, interrupted: Mapping[int, Values], ended: Iterable[Trial]
) -> SearchMethod:
    """Build a search method that knows the trials of a sweep so far.

    Args:
        search: name of the method.
        space: the search space.
        seed: of the sweep.
        interrupted: values of the trials that were accepted and have not ended, by number.
        ended: trials that have ended.

    Raises:
        SettingsError: grid search over a real interval.
    """
    if search == "grid":
        return GridSearch(space, seed)
    if search == "random":
        return RandomSearch(space, seed)
    method = TpeSearch(space, seed)
    for trial in ended:
        method.tell(trial)
    for number, values in interrupted.items():
        method.accept(number, values)
    return method


class _StatelessSearch:
    """Base of methods whose proposals do not depend on results."""

    def accept(self, number: int, values: Values) -> None:
        """Do nothing."""

    def discard(self, number: int) -> None:
        """Do nothing."""

    def tell(self, trial: Trial) -> None:
        """Do nothing."""


class GridSearch(_StatelessSearch):
    """Every combination once, in a random order, so that a grid that is stopped early is a random sample of it."""

    def __init__(self, space: Space, seed: int) -> None:
        self.names = [dimension.name for dimension in space.dimensions]
        self.levels = [_levels(dimension) for dimension in space.dimensions]
        self.shape = tuple(len(levels) for levels in self.levels)
        self.size = math.prod(self.shape)
        if self.size > MAX_GRID:
            raise SettingsError(
                f"grid search over {self.size:,} combinations: at most {MAX_GRID:,} are possible; give fewer values, "
                "or use --search random or tpe"
            )
        self.order = keyed_rng("tune-grid", seed).permutation(self.size)

    def ask(self, number: int) -> Values | None:
        """Return combination `number` of the shuffled grid, or None after the last one."""
        if number >= self.size:
            return None
        indices = np.unravel_index(int(self.order[number]), self.shape)
        return {name: levels[int(i)] for name, levels, i in zip(self.names, self.levels, indices, strict=True)}


class RandomSearch(_StatelessSearch):
    """Independent draws by Optuna's random sampler."""

    def __init__(self, space: Space, seed: int) -> None:
        self.distributions = _distributions(space)
        self.seed = seed

    def ask(self, number: int) -> Values:
        """Draw proposal `number`."""
        sampler = optuna.samplers.RandomSampler(_seed(self.seed, number))
        # Each draw has its own study, so it does not depend on earlier draws and memory does not grow.
        return dict(optuna.create_study(sampler=sampler).ask(self.distributions).params)


class TpeSearch:
    """Draws near trials with high accuracy, by Optuna's TPE sampler."""

    def __init__(self, space: Space, seed: int) -> None:
        self.distributions = _distributions(space)
        self.seed = seed
        self.study = optuna.create_study(direction="maximize")
        self._open: dict[int, optuna.trial.Trial] = {}
        """Optuna's trials without a result, by number."""

    def ask(self, number: int) -> Values:
        """Draw proposal `number`."""
        # The sampler is created per draw: a persistent one would repeat its random numbers after every resume. With
        # `constant_liar` running trials count as bad ones, so simultaneous draws differ.
        self.study.sampler = optuna.samplers.TPESampler(seed=_seed(self.seed, number), constant_liar=True)
        self._open[number] = self.study.ask(self.distributions)
        return dict(self._open[number].params)

    def accept(self, number: int, values: Values) -> None:
        """Record a running trial. If it was drawn before a resume, it is added to the study with these values."""
        if number not in self._open:
            self.study.enqueue_trial(values)
            self._open[number] = self.study.ask(self.distributions)

    def discard(self, number: int) -> None:
        """Mark the proposal as failed in the study."""
        self.study.tell(self._open.pop(number), state=TrialState.FAIL)

    def tell(self, trial: Trial) -> None:
        """Add a result to the study.

        A stopped trial is "pruned" with its curve, which TPE ranks below all finished trials. A failed or refused one
        counts as accuracy 0, so that TPE avoids such values.
        """
        result: dict[str, Any] = {"value": 0.0, "state": TrialState.COMPLETE}
        curve: dict[int, float] = {}
        if trial.last is not None and trial.status == "finished":
            result["value"] = trial.last.accuracy
        elif trial.last is not None and trial.status == "stopped":
            result = {"state": TrialState.PRUNED}
            curve = {point.step: point.accuracy for point in trial.curve}
        open_trial = self._open.pop(trial.number, None)
        if open_trial is None:
            params = {"params": dict(trial.settings), "distributions": self.distributions}
            self.study.add_trial(optuna.trial.create_trial(**result, **params, intermediate_values=curve))
            return
        for step, accuracy in curve.items():
            open_trial.report(accuracy, step)
        self.study.tell(open_trial, result.get("value"), state=result["state"])


def _levels(dimension: Dimension) -> Sequence[Value]:
    if not dimension.levels:
        raise SettingsError(
            f"{dimension.name}: grid search needs a list of values, but {dimension.kind} is an interval; write it as "
            "choice, or use --search random or tpe"
        )
    return dimension.levels


def _seed(sweep_seed: int, number: int) -> int:
    return int(keyed_rng("tune", sweep_seed, number).integers(2**31))


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


def values_key(values: Values) -> str:
    """A string that is equal for equal values."""
    return json.dumps(values, sort_keys=True)
