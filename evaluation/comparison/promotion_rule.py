"""Rule that decides from paired differences whether a challenger replaces the champion."""

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
MIN_EPISODES = 30
"""Fewer differences do not justify the normal approximation of the 95% interval."""


class RuleError(ValueError):
    """The promotion rule is not applicable: no task or an invalid margin."""


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, by which rule, and the reason in one line."""

    promoted: bool
    rule: Rule
    margin: float
    reason: str


def decide(differences: Sequence[PairedDifference], *, allow_equal: bool = False, margin: float = MARGIN) -> Decision:
    """Decide by the 95% intervals of the paired differences.

    On the first task the challenger must be better: the whole interval lies above zero. With `allow_equal` it only must
    not be worse there. On the other tasks it must not be worse: the whole interval lies at or above -margin. So a
    difference that the episodes do not resolve does not lead to a promotion.

    Args:
        differences: challenger minus champion for each task; at least one.
        allow_equal: not worse is enough on the first task too.
        margin: a fraction of accuracy in [0, 1).

    Raises:
        RuleError: there is no task, or the margin is not in [0, 1).
    """
    if not differences:
        raise RuleError("no task to decide on; use --way and --shot")
    check_margin(margin)
    rule: Rule = "not worse" if allow_equal else "better"
    first, *others = differences
    if rule == "better" and first.verdict != "better":
        return Decision(False, rule, margin, f"{_numbers(first)}: not better; {_remedy(first)}")
    for difference in differences if allow_equal else others:
        if not difference.difference - difference.ci95 >= -margin:  # also for NaN
            failure = f"may be worse by more than {_points(margin)}"
            return Decision(False, rule, margin, f"{_numbers(difference)}: {failure}; {_remedy(difference)}")
    on_others = f", and not worse by more than {_points(margin)} on {', '.join(map(_task, others))}" if others else ""
    outcome = rule if rule == "better" else f"not worse by more than {_points(margin)}"
    return Decision(True, rule, margin, f"{_numbers(first)}: {outcome}{on_others}")


def check_margin(margin: float) -> None:
    """Check the margin; call this before the evaluation, which can take hours.

    Raises:
        RuleError: it is not in [0, 1).
    """
    if not (math.isfinite(margin) and 0 <= margin < 1):
        raise RuleError(f"--margin {margin}: must be a fraction in [0, 1); 0.005 is half a percentage point")


def _task(difference: PairedDifference) -> str:
    return f"{difference.way}w{difference.shot}s"


def _points(margin: float) -> str:
    return f"{100 * margin:g} points"


def _numbers(paired: PairedDifference) -> str:
    """`5w1s: 91.20% against 90.10%, difference +1.10 ± 0.30 points, p 2e-10`."""
    difference = f"{100 * paired.difference:+.2f} ± {100 * paired.ci95:.2f} points, p {paired.t_test:.2g}"
    accuracies = f"{100 * paired.challenger:.2f}% against {100 * paired.champion:.2f}%"
    return f"{_task(paired)}: {accuracies}, difference {difference}"


def _remedy(paired: PairedDifference) -> str:
    if paired.verdict == "worse":
        return "the champion stays"
    return "the champion stays; more --episodes give a narrower interval"


def write_pairs(path: str | Path, challenger: Sequence[EpisodeResults], champion: Sequence[EpisodeResults]) -> None:
    """Write the accuracies of both models by episode to a Parquet file, one task after another.

    Without results of the champion its column is null.
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
