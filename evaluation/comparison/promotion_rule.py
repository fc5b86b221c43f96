"""Whether a challenger takes the place of a champion: a decision on paired differences, and its rows by episode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.paired import PairedDifference
from metagmvae.pipelines.files import atomic_file

Rule = Literal["first", "better", "not worse"]
MARGIN = 0.005
"""Half a percentage point of accuracy."""
FEWEST_EPISODES = 30
"""An interval of a mean by the normal law wants this many differences; one episode would have none at all."""


class RuleError(ValueError):
    """The rule to decide by is not one."""


@dataclass(frozen=True)
class Decision:
    """What was decided, by which rule, and why in one line."""

    promoted: bool
    rule: Rule
    margin: float
    reason: str


def decide(differences: Sequence[PairedDifference], *, allow_equal: bool = False, margin: float = MARGIN) -> Decision:
    """Decide on the tasks that both were judged on, the one that matters first.

    Without `allow_equal` the challenger must be better on the first task: the 95% interval of the paired difference
    lies wholly above zero. With it, not worse there. On all other tasks it must not be worse: the interval lies wholly
    above -margin. So a difference that few episodes cannot show is no ground for a promotion.

    Args:
        differences: challenger less champion, of each task; at least one.
        allow_equal: not worse is enough on the first task too.
        margin: a share in [0, 1) of accuracy.

    Raises:
        RuleError: there is no task, or the margin is none.
    """
    if not differences:
        raise RuleError("no task to decide by: give --way and --shot")
    check_margin(margin)
    rule: Rule = "not worse" if allow_equal else "better"
    first, *others = differences
    if rule == "better" and first.verdict != "better":
        return Decision(False, rule, margin, f"{_numbers(first)}: not better; {_remedy(first)}")
    for difference in differences if allow_equal else others:
        if not _not_worse(difference, margin):
            reach = f"not shown to be no worse than by {_points(margin)}"
            return Decision(False, rule, margin, f"{_numbers(difference)}: {reach}; {_remedy(difference)}")
    beside = f", and not worse by more than {_points(margin)} on {', '.join(map(_task, others))}" if others else ""
    word = rule if rule == "better" else f"not worse by more than {_points(margin)}"
    return Decision(True, rule, margin, f"{_numbers(first)}: {word}{beside}")


def check_margin(margin: float) -> None:
    """Refuse a margin that is none; to be asked before the hours that judging can take.

    Raises:
        RuleError: it is not a share in [0, 1).
    """
    if not (math.isfinite(margin) and 0 <= margin < 1):
        raise RuleError(f"--margin is {margin}: it is a share of accuracy from 0 up to 1; 0.005 is half a point")


def _not_worse(difference: PairedDifference, margin: float) -> bool:
    """The whole interval lies at or above -margin; with a margin of 0, equal in every episode will do."""
    return difference.difference - difference.ci95 >= -margin


def _task(difference: PairedDifference) -> str:
    return f"{difference.way}w{difference.shot}s"


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _numbers(paired: PairedDifference) -> str:
    """`5w1s: 91.20% against 90.10%, difference +1.10 ± 0.30 points, p 2e-10`."""
    by = f"difference {100 * paired.difference:+.2f} ± {100 * paired.ci95:.2f} points, p {paired.t_test:.2g}"
    return f"{_task(paired)}: {100 * paired.challenger:.2f}% against {100 * paired.champion:.2f}%, {by}"


def _remedy(paired: PairedDifference) -> str:
    if paired.verdict == "worse":
        return "the champion stays"
    return "the champion stays, and more --episodes may tell them apart"


def write_pairs(path: str | Path, challenger: Sequence[EpisodeResults], champion: Sequence[EpisodeResults]) -> None:
    """Accuracies of both by episode in Parquet, tasks one after another; the champion's are null where there is none.

    Args:
        path: of the file.
        challenger: one result for each task.
        champion: the same tasks in the same order, or none at all.
    """
    tables = []
    for number, result in enumerate(challenger):
        count = len(result.accuracies)
        task = {key: [getattr(result, key)] * count for key in ("way", "shot", "query", "seed", "mode")}
        other = pa.array(champion[number].accuracies if champion else [None] * count, pa.float64())
        columns = {"episode": np.arange(count), "challenger": result.accuracies, "champion": other}
        tables.append(pa.table(task | columns))
    with atomic_file(path) as file:
        pq.write_table(pa.concat_tables(tables), file)
