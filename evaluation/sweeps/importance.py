"""Importance of each setting of a sweep: functional ANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) by Optuna.

A random forest predicts accuracy from the settings. The importance of a setting is the variance of the forest's mean
prediction as a function of that setting alone, as a fraction of the variance of the prediction over the whole space.

A forest also finds structure in noise. The values of each setting are therefore shuffled among the trials and the
importance is computed again. A setting matters only if its importance is larger than all importances of its shuffled
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metagmvae.evaluation.sweeps.ranking import TrialsAtStep
from metagmvae.evaluation.sweeps.record import SweepRecord
from metagmvae.pipelines.optional_packages import optional_package

Array = np.ndarray
EVALUATOR = "optuna.importance.FanovaImportanceEvaluator"
MIN_TRIALS = 20
MIN_TRIALS_PER_SETTING = 4
"""With fewer trials than 20, or than 4 per setting, no importance is reported."""
TREES, SHUFFLED_TREES, SHUFFLES = 64, 8, 19
"""19 shuffles: a setting without effect exceeds all of them once in 20 times (5% level)."""
SEED = 0
MIN_IMPORTANCE = 0.01
"""A setting below 1% does not matter, however certain its importance is."""
MAX_DEPTH = 6
"""Of each tree. Deeper trees fit noise, and the time of Optuna's evaluator grows with the square of their leaves."""
MAX_TRIALS = 1000
"""A larger sweep is represented by a random sample of this size, to bound the time."""


@dataclass(frozen=True)
class SettingImportance:
    """Importance of one setting."""

    name: str
    importance: float
    """Fraction of the variance over the space, mean over the trees."""
    low: float
    high: float
    """2.5% and 97.5% quantiles over the trees. Each tree is fitted to its own bootstrap sample of the trials."""
    chance: float
    """Largest importance over 19 shuffles of the setting's values among the trials."""

    @property
    def matters(self) -> bool:
        """Whether the importance exceeds chance (5% level) and is not negligible."""
        return self.importance > max(self.chance, MIN_IMPORTANCE)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON. `names` is a list because earlier versions also listed pairs of settings."""
        numbers = {key: value for key, value in asdict(self).items() if key != "name"}
        return {"names": [self.name], **numbers, "matters": self.matters}


@dataclass(frozen=True)
class Importance:
    """Importance of all settings of a sweep."""

    step: int
    """Training steps at which all trials are compared."""
    trials: int
    too_few: str = ""
    """Why there is no importance; empty if there is one."""
    explained: float = 0.0
    """Out-of-bag R² of a random forest: the fraction of the variance between trials that their settings predict. The
    rest is noise of training and validation. At or below 0 the importances are meaningless."""
    settings: tuple[SettingImportance, ...] = ()
    """In order of decreasing importance."""

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        settings = [setting.summary() for setting in self.settings]
        return {**asdict(self), "evaluator": EVALUATOR, "settings": settings}


def compute_importance(sweep: SweepRecord, compared: TrialsAtStep) -> Importance:
    """Compute the importance of every setting from trials with equal budgets.

    The search space is treated as a product. Where combinations are impossible (K > M), the forest extrapolates.

    Raises:
        DataError: a trial does not fit the space.
    """
    count, needed = len(compared.trials), max(MIN_TRIALS, MIN_TRIALS_PER_SETTING * len(sweep.dimensions))
    if count < needed:
        reason = f"too few trials: {count} have an accuracy, {needed} are needed for {len(sweep.dimensions)} settings"
        return Importance(compared.step, count, reason)
    if np.ptp(compared.accuracy) == 0:
        return Importance(compared.step, count, f"all {count} trials have the same accuracy")
    unit, accuracy, rng = sweep.positions(compared.trials), compared.accuracy, np.random.default_rng(SEED)
    if count > MAX_TRIALS:
        sample = np.sort(rng.choice(count, MAX_TRIALS, replace=False))
        unit, accuracy = unit[sample], accuracy[sample]
    fractions = _variance_fractions(unit, accuracy, TREES, SEED)
    low, high = np.quantile(fractions, (0.025, 0.975), axis=0)
    settings = [
        SettingImportance(
            dimension.name,
            float(fractions[:, column].mean()),
            float(low[column]),
            float(high[column]),
            _chance(unit, accuracy, column, rng),
        )
        for column, dimension in enumerate(sweep.dimensions)
    ]
    ordered = sorted(settings, key=lambda setting: -setting.importance)
    return Importance(compared.step, count, "", _explained(unit, accuracy), tuple(ordered))


def _chance(unit: Array, accuracy: Array, column: int, rng: np.random.Generator) -> float:
    """Largest importance of a setting over repeated shuffles of its values among the trials."""
    largest = 0.0
    for _ in range(SHUFFLES):
        shuffled = unit.copy()
        rng.shuffle(shuffled[:, column])
        fractions = _variance_fractions(shuffled, accuracy, SHUFFLED_TREES, int(rng.integers(2**31)))
        largest = max(largest, float(fractions[:, column].mean()))
    return largest


def _variance_fractions(unit: Array, accuracy: Array, trees: int, seed: int) -> Array:
    """Fractions of the variance that each setting has alone, one row per tree: (trees, settings).

    `unit` holds the settings on the unit cube, (trials, settings). Each tree has its own seed, from `seed` on.
    """
    with optional_package("optuna", "the importance of the settings of a sweep"):
        from optuna.importance import FanovaImportanceEvaluator

    study, names = _study(unit, accuracy), [str(column) for column in range(unit.shape[1])]
    rows = []
    for tree in range(trees):
        evaluator = FanovaImportanceEvaluator(n_trees=1, max_depth=MAX_DEPTH, seed=seed + tree)
        try:
            importances = evaluator.evaluate(study, params=names)
        except RuntimeError:  # all accuracies in the bootstrap sample of this tree are equal
            continue
        rows.append([float(importances[name]) for name in names])
    return np.array(rows or [[0.0] * len(names)])


def _study(unit: Array, accuracy: Array) -> Any:
    """An Optuna study of completed trials whose parameters are the columns of `unit`."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {
        str(column): optuna.distributions.FloatDistribution(0.0, 1.0) for column in range(unit.shape[1])
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials([_trial(row, value, distributions) for row, value in zip(unit, accuracy, strict=True)])
    return study


def _trial(row: Sequence[float], accuracy: float, distributions: dict[str, Any]) -> Any:
    from optuna.trial import create_trial

    params = {name: float(value) for name, value in zip(distributions, row, strict=True)}
    return create_trial(params=params, distributions=distributions, value=float(accuracy))


def _explained(unit: Array, accuracy: Array) -> float:
    """Out-of-bag R² of a forest like the one that Optuna fits."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(TREES, max_depth=MAX_DEPTH, oob_score=True, random_state=SEED)
    return float(forest.fit(unit, accuracy).oob_score_)
