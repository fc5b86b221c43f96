"""Paired differences of all rows of a comparison to the first row, where the accuracy of every episode is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from metagmvae.evaluation.comparison.formatting import Task, task_name
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, trainings_of_means
from metagmvae.evaluation.fewshot.paired import PairedDifference, across_seeds, paired_difference

MIN_EPISODES = 2
"""A single difference has no standard deviation."""


@dataclass(frozen=True)
class PairedComparison:
    """Accuracy of one row minus that of another on the same episodes of one task."""

    challenger: str
    champion: str
    split: str
    paired: PairedDifference
    trainings: int
    """Number of trainings behind `over_trainings`; 0 if that is None."""
    over_trainings: tuple[float, float] | None
    """Mean difference over trainings and half width of its 95% interval (Student's t)."""

    @property
    def task(self) -> str:
        """The task as text: `(5,1)`."""
        return task_name((self.paired.way, self.paired.shot))

    def summary(self) -> dict[str, Any]:
        """Return plain values for JSON; accuracies and differences are fractions in [0, 1]."""
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

    The head of an encoder has its own mode: a row of kind `encoder` is compared with the first row in spite of it.
    A mean over trainings replaces its trainings, unless it would be the only row of the protocol.
    """
    comparisons = []
    known = [row for row in rows if any(score.by_episode for score in row.scores.values())]
    groups: dict[EvalProtocol, list[Row]] = {}
    for row in known:
        groups.setdefault(_compared_as(row, known[0]), []).append(row)
    for protocol, group in groups.items():
        compared = _without_trainings(group)
        for task in dict.fromkeys(task for row in compared[1:] for task in row.scores):
            pairs = (_compare(row, compared[0], task, protocol) for row in compared[1:])
            comparisons += [pair for pair in pairs if pair is not None]
    return comparisons


def _compared_as(row: Row, first: Row) -> EvalProtocol:
    """Return the protocol that a row is grouped by; that of the first row if one of them is the head of an encoder."""
    same_episodes = replace(row.protocol, mode=first.protocol.mode) == first.protocol
    return first.protocol if same_episodes and "encoder" in (row.kind, first.kind) else row.protocol


def _without_trainings(rows: list[Row]) -> list[Row]:
    """Leave out the trainings behind a mean, or the mean itself if it would be the only row."""
    members = trainings_of_means(rows)
    together = [row for row in rows if id(row) not in members]
    if len(together) > 1:
        order = {id(row): position for position, row in enumerate(rows)}
        return sorted(together, key=lambda row: min(order[id(member)] for member in row.members or (row,)))
    return [row for row in rows if not row.members]


def _compare(challenger: Row, champion: Row, task: Task, protocol: EvalProtocol) -> PairedComparison | None:
    """Return None if the accuracies by episode are not known for both, or too few."""
    scores = (challenger.scores.get(task), champion.scores.get(task))
    first, second = (score.by_episode if score is not None else None for score in scores)
    if first is None or second is None or len(first.accuracies) < MIN_EPISODES:
        return None
    differences = _by_training(challenger, champion, task)
    several = len(differences) > 1
    return PairedComparison(
        challenger.name,
        champion.name,
        protocol.split or "",
        paired_difference(first, second, any_mode="encoder" in (challenger.kind, champion.kind)),
        len(differences) if several else 0,
        across_seeds(differences) if several else None,
    )


def _by_training(challenger: Row, champion: Row, task: Task) -> list[float]:
    """Return one difference for each training.

    If both rows have several trainings, those of equal seed are paired, else every one is paired with the single one.
    """
    ours, theirs = _by_seed(challenger, task), _by_seed(champion, task)
    if challenger.members and champion.members:
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return [our - their for our in ours.values() for their in theirs.values()]


def _by_seed(row: Row, task: Task) -> dict[str, float]:
    """Return the accuracy of each training by the end of its name, its seed."""
    return {one.name.rpartition("-seed")[2]: one.scores[task].accuracy for one in row.members or (row,)}
