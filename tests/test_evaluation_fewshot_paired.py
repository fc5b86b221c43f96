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


def test_mean_and_interval_of_the_differences_per_episode():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 200)  # episodes differ more than the models
    better, worse = hard + 0.02 + rng.normal(0, 0.03, 200), hard
    paired = paired_difference(results(better), results(worse))
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    mean = sum(differences) / 200
    std = math.sqrt(sum((d - mean) ** 2 for d in differences) / 199)
    assert paired.difference == pytest.approx(mean)
    assert paired.ci95 == pytest.approx(1.96 * std / math.sqrt(200))
    assert paired.t_test == pytest.approx(stats.ttest_rel(better, worse).pvalue)
    assert paired.wilcoxon == pytest.approx(stats.wilcoxon(better, worse).pvalue)
    assert paired.verdict == "better"
    assert paired_difference(results(worse), results(better)).verdict == "worse"
    # The unpaired intervals overlap.
    assert results(better).ci95 + results(worse).ci95 > paired.difference


def test_equal_models_and_a_constant_difference():
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
def test_results_of_different_episodes_are_refused(changes):
    champion = results(np.zeros(5))
    with pytest.raises(PairingError, match=next(iter(changes))):
        paired_difference(champion, results(np.zeros(5), **changes))
    with pytest.raises(PairingError, match="episodes 5 and 4"):
        paired_difference(champion, results(np.zeros(4)))


def test_one_episode_is_refused():
    with pytest.raises(PairingError, match="at least 2 episodes"):
        paired_difference(results(np.ones(1)), results(np.zeros(1)))


def test_interval_over_trainings_uses_student_t():
    mean, ci95 = across_seeds([0.5, 0.6, 0.55])
    low, high = stats.t.interval(0.95, 2, loc=0.55, scale=stats.sem([0.5, 0.6, 0.55]))
    assert mean == pytest.approx(0.55)
    assert (mean - ci95, mean + ci95) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="at least 2"):
        across_seeds([0.5])
