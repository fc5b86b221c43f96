"""Two models on the same episodes: the difference between them, its interval, and a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import ttest_1samp, wilcoxon

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.metrics import mean_ci95

Verdict = Literal["better", "worse", "undecided"]


class PairingError(ValueError):
    """Results that are not of the same episodes."""


@dataclass(frozen=True)
class PairedDifference:
    """Challenger less champion, per episode; accuracies are shares in [0, 1]."""

    way: int
    shot: int
    mode: str
    episodes: int
    challenger: float
    champion: float
    difference: float
    """Mean of challenger less champion over the episodes."""
    ci95: float
    """Half width of its 95% interval, 1.96 * std / sqrt(n)."""
    t_test: float
    """p of the paired t-test (two-sided); 1 where no episode differs."""
    wilcoxon: float
    """p of Wilcoxon's signed-rank test (two-sided), which assumes no normal differences; 1 where none differs."""

    @property
    def verdict(self) -> Verdict:
        """By the interval: wholly above zero, wholly below it, or neither."""
        if self.difference - self.ci95 > 0:
            return "better"
        return "worse" if self.difference + self.ci95 < 0 else "undecided"

    def summary(self) -> dict[str, Any]:
        """As plain values, the verdict with them."""
        return asdict(self) | {"verdict": self.verdict}


def paired_difference(challenger: EpisodeResults, champion: EpisodeResults) -> PairedDifference:
    """Compare two models judged on the same episodes.

    Raises:
        PairingError: the episodes differ (way, shot, queries, seed, mode or their number), or there is only one, whose
            interval would have no width.
    """
    keys = ("way", "shot", "query", "seed", "mode")
    of_one, of_other = ([*(getattr(r, key) for key in keys), len(r.accuracies)] for r in (challenger, champion))
    if of_one != of_other:
        unequal = [
            f"{key} {one} and {other}"
            for key, one, other in zip((*keys, "episodes"), of_one, of_other, strict=True)
            if one != other
        ]
        raise PairingError(f"not the same episodes: {', '.join(unequal)}; judge both with one request")
    if len(challenger.accuracies) < 2:
        raise PairingError("1 episode has no interval; judge both on two episodes at least")
    difference = np.asarray(challenger.accuracies, np.float64) - np.asarray(champion.accuracies, np.float64)
    mean, ci95 = mean_ci95(difference)
    t_test, signed_rank = _p_values(difference)
    return PairedDifference(
        challenger.way,
        challenger.shot,
        challenger.mode,
        len(difference),
        challenger.mean,
        champion.mean,
        mean,
        ci95,
        t_test,
        signed_rank,
    )


def _p_values(difference: np.ndarray) -> tuple[float, float]:
    """Of the t-test and of Wilcoxon's test that the differences lie around zero."""
    if not difference.any():
        return 1.0, 1.0
    if np.ptp(difference) == 0:
        # Every episode differs by the same: the t statistic is infinite.
        return 0.0, float(wilcoxon(difference).pvalue)
    return float(ttest_1samp(difference, 0.0).pvalue), float(wilcoxon(difference).pvalue)


def across_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean over trainings and half width of its 95% interval (Student's t); needs two at least."""
    from scipy.stats import t

    if len(values) < 2:
        raise ValueError(f"{len(values)} training; an interval over trainings needs two at least")
    spread = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * spread)
