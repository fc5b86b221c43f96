"""Paired comparison of two models on the same episodes, and the confidence interval over trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.metrics import mean_ci95

Verdict = Literal["better", "worse", "undecided"]
SAME_EPISODES = ("way", "shot", "query", "seed", "mode", "groups")
"""Fields that two results must share, besides the number of episodes, to be paired."""


class PairingError(ValueError):
    """Two results are not of the same episodes."""


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a challenger minus that of a champion, per episode; accuracies are fractions in [0, 1]."""

    way: int
    shot: int
    mode: str
    episodes: int
    challenger: float
    champion: float
    difference: float
    """Mean over the episodes of challenger minus champion."""
    ci95: float
    """Half-width of its 95% confidence interval, 1.96 * std / sqrt(n)."""
    t_test: float
    """p-value of the paired t-test (two-sided); 1 if no episode differs."""
    wilcoxon: float
    """p-value of Wilcoxon's signed-rank test (two-sided), which assumes no normality; 1 if no episode differs."""

    @property
    def verdict(self) -> Verdict:
        """`better` if the interval lies above zero, `worse` if it lies below zero, else `undecided`."""
        if self.difference - self.ci95 > 0:
            return "better"
        return "worse" if self.difference + self.ci95 < 0 else "undecided"

    def summary(self) -> dict[str, Any]:
        """Return plain values, including the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def paired_difference(
    challenger: EpisodeResults, champion: EpisodeResults, *, any_mode: bool = False
) -> PairedDifference:
    """Compare two models that were evaluated on the same episodes.

    `any_mode` accepts a transductive and an inductive result; the mode of the difference is that of the challenger.

    Raises:
        PairingError: the episodes differ (way, shot, query, seed, mode, groups or their number), or there is only one,
            which gives no interval.
    """
    count = len(challenger.accuracies)
    differing = [
        f"{key} {ours} and {theirs}"
        for key, ours, theirs in (
            *((key, getattr(challenger, key), getattr(champion, key)) for key in SAME_EPISODES),
            ("episodes", count, len(champion.accuracies)),
        )
        if ours != theirs and not (any_mode and key == "mode")
    ]
    if differing:
        raise PairingError(f"not the same episodes: {', '.join(differing)}; evaluate both models with one request")
    difference = np.asarray(challenger.accuracies, np.float64) - np.asarray(champion.accuracies, np.float64)
    mean, ci95 = mean_ci95(difference)
    if ci95 is None:
        raise PairingError(f"{count} episode gives no confidence interval; evaluate both models on at least 2 episodes")
    task, accuracies = (challenger.way, challenger.shot, challenger.mode, count), (challenger.mean, champion.mean)
    return PairedDifference(*task, *accuracies, mean, ci95, *_p_values(difference))


def paired_with_baselines(result: EpisodeResults) -> list[dict[str, Any]]:
    """Return the model minus each of its baselines on the same episodes, as plain values.

    The keys are those of `PairedDifference.summary` without `challenger` and `champion`, and `baseline` and
    `baseline_mode`. Empty for a single episode, which gives no interval.
    """
    if len(result.accuracies) < 2:
        return []
    rows = []
    for name, baseline in result.baselines.items():
        summary = paired_difference(result, baseline, any_mode=True).summary()
        values = {key: value for key, value in summary.items() if key not in ("challenger", "champion")}
        rows.append({"baseline": name, "baseline_mode": baseline.mode} | values)
    return rows


def _p_values(difference: np.ndarray) -> tuple[float, float]:
    """Return the p-values of the t-test and of Wilcoxon's test that the differences are centred at zero."""
    if not difference.any():
        return 1.0, 1.0
    from scipy import stats  # takes most of a second, and most commands need no test

    wilcoxon = float(stats.wilcoxon(difference).pvalue)
    if np.ptp(difference) == 0:
        # All episodes differ by the same amount: the t statistic is infinite.
        return 0.0, wilcoxon
    return float(stats.ttest_1samp(difference, 0.0).pvalue), wilcoxon


def across_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over trainings and the half-width of its 95% confidence interval (Student's t).

    Raises:
        ValueError: there are fewer than two trainings.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} training gives no confidence interval over trainings; give at least 2")
    from scipy import stats

    standard_error = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * standard_error)
