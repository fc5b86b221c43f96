"""Paired differences between the rows of a comparison, where the accuracy of every episode is known.

`evaluation.fewshot.paired` compares two results; here are all rows against the first, and the interval over trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Task
from metagmvae.evaluation.fewshot.paired import PairedDifference, across_seeds, paired_difference

LEAST_EPISODES = 2
"""One difference has no spread."""


@dataclass(frozen=True)
class PairedComparison:
    """One row less another on the same episodes of one task."""

    challenger: str
    champion: str
    split: str
    paired: PairedDifference
    trainings: int
    """Over which the second interval goes; 0: there is none."""
    over_trainings: tuple[float, float] | None
    """Mean difference over trainings and half width of its 95% interval (Student's t)."""

    def summary(self) -> dict[str, Any]:
        """As plain values; accuracies and differences are shares in [0, 1]."""
        mean, ci95 = self.over_trainings or (None, None)
        return {
            "name": self.challenger,
            "against": self.champion,
            "split": self.split,
            **self.paired.summary(),
            "trainings": self.trainings,
            "difference_over_trainings": mean,
            "ci95_over_trainings": ci95,
        }


def compare_with_first(rows: Sequence[Row]) -> list[PairedComparison]:
    """Compare the rows of each protocol with the first of them, task by task.

    Where rows have been put together as trainings of one name, their mean takes part in their place, unless nothing
    else would be left to compare with.
    """
    found = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        known = [row for row in rows if row.protocol == protocol and any(s.each for s in row.scores.values())]
        together = _comparable_pairs(known)
        tasks = dict.fromkeys(task for row in together[1:] for task in row.scores)
        found += [
            one
            for task in tasks
            for row in together[1:]
            for one in _paired_comparison(row, together[0], task, protocol)
        ]
    return found


def _comparable_pairs(rows: list[Row]) -> list[Row]:
    """Means in the place of their trainings, where at least two stand against each other."""
    members = {id(member) for row in rows for member in row.members}
    together = [row for row in rows if id(row) not in members]
    if len(together) > 1:
        order = {id(row): position for position, row in enumerate(rows)}
        return sorted(together, key=lambda row: min(order[id(one)] for one in row.members or (row,)))
    return [row for row in rows if not row.members]


def _paired_comparison(challenger: Row, champion: Row, task: Task, protocol: EvalProtocol) -> list[PairedComparison]:
    scores = (challenger.scores.get(task), champion.scores.get(task))
    one, other = (score.each if score is not None else None for score in scores)
    if one is None or other is None or len(one.accuracies) < LEAST_EPISODES:
        return []
    differences = _over_trainings(challenger, champion, task)
    several = len(differences) > 1
    return [
        PairedComparison(
            challenger.name,
            champion.name,
            protocol.split or "",
            paired_difference(one, other),
            len(differences) if several else 0,
            across_seeds(differences) if several else None,
        )
    ]


def _over_trainings(challenger: Row, champion: Row, task: Task) -> list[float]:
    """A difference for each training: by equal seed where both have several, else each against the one there is."""
    ones, others = _by_seed(challenger, task), _by_seed(champion, task)
    if challenger.members and champion.members:
        return [ones[seed] - others[seed] for seed in ones if seed in others]
    return [one - other for one in ones.values() for other in others.values()]


def _by_seed(row: Row, task: Task) -> dict[str, float]:
    """Accuracy of each training, by the end of its name."""
    return {one.name.rpartition("-seed")[2]: one.scores[task].accuracy for one in row.members or (row,)}
