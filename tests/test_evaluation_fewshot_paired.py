"""Paired differences against loops and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.paired import PairingError, across_seeds, paired_difference


def results(accuracies: np.ndarray, **changes: object) -> EpisodeResults:
    task = {"way": 5, "shot": 1, "query": 15, "seed": 0, "mode": "transductive", "seconds": 1.0} | changes
    return EpisodeResults(accuracies=np.asarray(accuracies, np.float64), **task)  # type: ignore[arg-type]


def test_the_difference_is_per_episode_and_its_interval_that_of_the_differences():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 200)  # episodes differ far more than the models do
    one, other = hard + 0.02 + rng.normal(0, 0.03, 200), hard
    paired = paired_difference(results(one), results(other))
    each = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(each) / 200
    deviation = math.sqrt(sum((d - mean) ** 2 for d in each) / 199)
    assert paired.difference == pytest.approx(mean)
    assert paired.ci95 == pytest.approx(1.96 * deviation / math.sqrt(200))
    assert paired.t_test == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert paired.wilcoxon == pytest.approx(stats.wilcoxon(one, other).pvalue)
    assert paired.verdict == "better"
    assert paired_difference(results(other), results(one)).verdict == "worse"
    # Unpaired intervals would tell nothing here.
    assert results(one).ci95 + results(other).ci95 > paired.difference


def test_equal_models_are_undecided_and_a_constant_difference_is_certain():
    same = np.linspace(0.5, 0.9, 20)
    equal = paired_difference(results(same), results(same))
    assert (equal.difference, equal.ci95, equal.t_test, equal.wilcoxon) == (0.0, 0.0, 1.0, 1.0)
    assert equal.verdict == "undecided"
    half = np.full(20, 0.5)
    shifted = paired_difference(results(half + 0.25), results(half))
    assert shifted.verdict == "better"
    assert shifted.t_test == 0.0
    assert shifted.wilcoxon < 1e-4


@pytest.mark.parametrize("changes", [{"seed": 1}, {"shot": 5}, {"mode": "inductive"}, {"query": 5}])
def test_other_episodes_are_refused_by_what_differs(changes):
    one = results(np.zeros(5))
    with pytest.raises(PairingError, match=next(iter(changes))):
        paired_difference(one, results(np.zeros(5), **changes))
    with pytest.raises(PairingError, match="episodes 5 and 4"):
        paired_difference(one, results(np.zeros(4)))


def test_one_episode_decides_nothing():
    with pytest.raises(PairingError, match="two episodes at least"):
        paired_difference(results(np.ones(1)), results(np.zeros(1)))


def test_interval_over_trainings_is_students():
    mean, half = across_seeds([0.5, 0.6, 0.55])
    low, high = stats.t.interval(0.95, 2, loc=0.55, scale=stats.sem([0.5, 0.6, 0.55]))
    assert mean == pytest.approx(0.55)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="two at least"):
        across_seeds([0.5])
