"""The promotion decision from 95% intervals of paired differences."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from metagmvae.evaluation.comparison.promotion_rule import RuleError, decide, write_pairs
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.paired import PairedDifference, paired_difference


def pair(difference: float, ci95: float, shot: int = 1) -> PairedDifference:
    return PairedDifference(5, shot, "transductive", 100, 0.5 + difference, 0.5, difference, ci95, 0.01, 0.01)


@pytest.mark.parametrize(
    ("pairs", "better", "not_worse"),
    [
        ([pair(0.02, 0.01)], True, True),
        ([pair(0.01, 0.01)], False, True),  # the interval touches zero
        ([pair(0.0, 0.004)], False, True),
        ([pair(0.0, 0.006)], False, False),  # may be worse by more than half a point
        ([pair(-0.002, 0.002)], False, True),  # the interval ends at -0.4 points
        ([pair(-0.02, 0.01)], False, False),
        ([pair(0.02, 0.01), pair(0.0, 0.004, 5)], True, True),
        ([pair(0.02, 0.01), pair(-0.004, 0.002, 5)], False, False),  # better on the first task, worse on the second
        ([pair(0.0, 0.004), pair(0.02, 0.01, 5)], False, True),  # the challenger must be better on the first task
    ],
)
def test_better_on_the_first_task_and_not_worse_on_the_others(pairs, better, not_worse):
    assert decide(pairs).promoted is better
    assert decide(pairs, allow_equal=True).promoted is not_worse


def test_not_worse_allows_the_margin():
    assert decide([pair(-0.01, 0.005)], allow_equal=True, margin=0.015).promoted
    assert not decide([pair(-0.01, 0.005)], allow_equal=True, margin=0.014).promoted
    assert not decide([pair(0.0, 0.001)], allow_equal=True, margin=0.0).promoted
    assert decide([pair(0.0, 0.0)], allow_equal=True, margin=0.0).promoted


def test_reason_names_the_task_and_its_numbers():
    reason = decide([pair(0.02, 0.01), pair(-0.03, 0.01, 5)]).reason
    assert reason.startswith("5w5s: 47.00% against 50.00%, difference -3.00 ± 1.00 points, p 0.01: may be worse by")
    assert reason.endswith("the champion stays")
    assert decide([pair(0.001, 0.01)]).reason.endswith("more --episodes give a narrower interval")
    good = decide([pair(0.02, 0.01), pair(0.0, 0.001, 5)])
    assert (good.rule, good.reason.endswith("better, and not worse by more than 0.5 points on 5w5s")) == (
        "better",
        True,
    )


@pytest.mark.parametrize("margin", [-0.1, 1.0, float("nan"), float("inf")])
def test_invalid_margins_are_refused(margin):
    with pytest.raises(RuleError, match="--margin"):
        decide([pair(0.1, 0.01)], margin=margin)


def test_decision_without_a_task_is_refused():
    with pytest.raises(RuleError, match="no task"):
        decide([])


def result(accuracies, shot=1) -> EpisodeResults:
    return EpisodeResults(5, shot, 15, 0, "transductive", np.asarray(accuracies, np.float64), 1.0)


def test_pairs_are_written_by_episode(tmp_path):
    one, other = [result([0.5, 0.75]), result([1.0, 0.5], 5)], [result([0.25, 0.75]), result([0.5, 0.5], 5)]
    write_pairs(tmp_path / "both.parquet", one, other)
    rows = pq.read_table(tmp_path / "both.parquet").to_pylist()
    assert [(row["shot"], row["episode"], row["challenger"], row["champion"]) for row in rows] == [
        (1, 0, 0.5, 0.25),
        (1, 1, 0.75, 0.75),
        (5, 0, 1.0, 0.5),
        (5, 1, 0.5, 0.5),
    ]
    mean = np.mean([row["challenger"] - row["champion"] for row in rows if row["shot"] == 1])
    assert mean == paired_difference(one[0], other[0]).difference
    write_pairs(tmp_path / "alone.parquet", one, [])
    alone = pq.read_table(tmp_path / "alone.parquet")
    assert alone["champion"].null_count == 4
    assert alone.schema.equals(pq.read_table(tmp_path / "both.parquet").schema)
