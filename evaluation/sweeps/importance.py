"""How much each setting of a sweep matters: functional ANOVA on a random forest (Hutter, Hoos and Leyton-Brown,
ICML 2014).

A forest learns accuracy from settings. A tree of it is constant on boxes, so its mean over all settings but some is an
exact sum over leaves. The variance of that marginal, as a share of the tree's variance over the whole space, is the
importance of those settings: of one alone, and of two together beyond what each does alone (an interaction).

Forests find something in noise too. So each setting is shuffled among the trials and judged again: what it then gets
is what chance gives. A setting that does not beat that has not been shown to matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from metagmvae.evaluation.sweeps.partition_tree import PartitionTree
from metagmvae.evaluation.sweeps.ranking import TrialsAtStep
from metagmvae.evaluation.sweeps.record import SweepRecord

Array = np.ndarray
FEWEST = 20
PER_SETTING = 4
"""Fewer trials than 20, or than 4 for each setting, and nothing is said."""
TREES, SHUFFLED_TREES, SHUFFLES = 100, 16, 19
"""19 shuffles: the largest of them is exceeded by chance once in 20 times."""
LEAST = 0.01
"""Less than 1% is not called something that matters, however sure it is."""
LEAF = 3
"""Trials in a leaf, at least: single ones are noise."""
MOST_LEAVES = 400
MOST_TRIALS = 1000
"""Of more trials a seeded draw is taken: it says the same, and time stays bounded."""


@dataclass(frozen=True)
class ImportanceShare:
    """Importance of a setting, or of two settings together beyond what each does alone."""

    names: tuple[str, ...]
    importance: float
    """Share of the forest's variance over the space, mean over its trees."""
    low: float
    high: float
    """2.5% and 97.5% quantiles over the trees, each of which learned from its own bootstrap sample of the trials."""
    chance: float | None = None
    """The most that this setting got in 19 shuffles of its values; None of an interaction, which is not shuffled."""

    @property
    def matters(self) -> bool:
        """Whether it beats chance (at the 5% level, for one setting) and is not negligible."""
        return self.chance is not None and self.importance > max(self.chance, LEAST)


@dataclass(frozen=True)
class Importance:
    """What the trials of a sweep say about its settings."""

    step: int
    """Training steps at which all trials were judged."""
    trials: int
    too_few: str = ""
    """Why nothing else is said; empty where something is."""
    explained: float = 0.0
    """R² of the forest on trials that a tree did not learn from: the share of what differs between trials that their
    settings foretell. The rest is noise of training and validation. At or below 0 importance means nothing."""
    settings: tuple[ImportanceShare, ...] = ()
    """The largest first."""
    pairs: tuple[ImportanceShare, ...] = ()
    """The largest interactions first."""

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"settings": [asdict(share) | {"matters": share.matters} for share in self.settings]}


def importance_of(sweep: SweepRecord, judged: TrialsAtStep, seed: int = 0) -> Importance:
    """Importance of every setting, from trials at one budget.

    The space is taken as a product: where combinations are impossible (K > M), the forest guesses there.

    Raises:
        DataError: a trial does not fit the space.
    """
    count, needed = len(judged.trials), max(FEWEST, PER_SETTING * len(sweep.axes))
    if count < needed:
        why = f"too few trials: {count} with an accuracy, and {needed} are needed for {len(sweep.axes)} settings"
        return Importance(judged.step, count, why)
    if np.ptp(judged.accuracy) == 0:
        return Importance(judged.step, count, f"nothing to tell apart: all {count} trials have the same accuracy")
    places, accuracy, rng = sweep.places(judged.trials), judged.accuracy, np.random.default_rng(seed)
    if count > MOST_TRIALS:
        drawn = np.sort(rng.choice(count, MOST_TRIALS, replace=False))
        places, accuracy = places[drawn], accuracy[drawn]
    levels = [len(axis.levels) for axis in sweep.axes]
    names = [axis.name for axis in sweep.axes]
    forest, trees = _forest(places, accuracy, levels, TREES, seed, oob=True)
    alone = np.array([[tree.variance_of(column) for column in range(len(names))] for tree in trees])
    total = np.array([tree.variance for tree in trees])
    chance = [_chance(places, accuracy, levels, column, rng) for column in range(len(names))]
    settings = [_share((name,), alone[:, j] / total, chance[j]) for j, name in enumerate(names)]
    pairs = [
        _share((names[i], names[j]), np.array([tree.variance_of_pair(i, j) for tree in trees]) / total)
        for i, j in combinations(range(len(names)), 2)
    ]
    return Importance(judged.step, count, "", float(forest.oob_score_), _sorted(settings), _sorted(pairs))


def _share(names: tuple[str, ...], shares: Array, chance: float | None = None) -> ImportanceShare:
    low, high = np.quantile(shares, (0.025, 0.975))
    return ImportanceShare(names, float(shares.mean()), float(low), float(high), chance)


def _sorted(shares: Sequence[ImportanceShare]) -> tuple[ImportanceShare, ...]:
    return tuple(sorted(shares, key=lambda share: -share.importance))


def _chance(places: Array, accuracy: Array, levels: Sequence[int], column: int, rng: np.random.Generator) -> float:
    """The largest importance of a setting that was shuffled among the trials."""
    found = []
    for _ in range(SHUFFLES):
        shuffled = places.copy()
        rng.shuffle(shuffled[:, column])
        _, trees = _forest(shuffled, accuracy, levels, SHUFFLED_TREES, int(rng.integers(2**31)))
        found.append(np.mean([tree.variance_of(column) / tree.variance for tree in trees] or [0.0]))
    return float(max(found))


def _forest(
    places: Array, accuracy: Array, levels: Sequence[int], trees: int, seed: int, *, oob: bool = False
) -> tuple[Any, list[PartitionTree]]:
    """A fitted forest, and its trees that are not constant.

    Args:
        places: (trials, axes) in [0, 1].
        accuracy: (trials,).
        levels: number of levels of each axis, 0 of a real range.
        oob: judge each trial by the trees that did not learn from it.
    """
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(
        trees, min_samples_leaf=LEAF, max_leaf_nodes=MOST_LEAVES, oob_score=oob, random_state=seed
    )
    forest.fit(places, accuracy)
    read = [PartitionTree(estimator.tree_, levels) for estimator in forest.estimators_]
    return forest, [tree for tree in read if tree.variance > 0]
