"""Episodes whose queries are unbalanced, or of classes without labelled images, by index.

Episode i depends on (seed, i) alone, and has the classes and the support of `EpisodeSampler` with the same arguments.

Notation: K ways, S shots, Q queries per class, P queries of an episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.episodes import EpisodeSampler, query_positions

MAX_ALPHA = 1e6


class QuerySampler:
    """Draws the support and the queries of episodes; an episode of any kind has the same number of queries."""

    def __init__(
        self,
        labels: EpisodeLabels,
        *,
        way: int,
        shot: int,
        query: int,
        seed: int,
        mix_groups: bool = False,
        unbalanced: bool = False,
        dirichlet: float | None = None,
        open_classes: int = 0,
    ) -> None:
        """Group the rows by class. Without the last three arguments the queries are balanced: Q of each class.

        Args:
            labels, way, shot, query, seed, mix_groups: as in `EpisodeSampler`.
            unbalanced: the first half of the classes has Q queries each, the others one (`query_positions`).
            dirichlet: K * Q queries, whose classes are drawn from proportions pi ~ Dir(alpha, ..., alpha), with this
                alpha. A class never has more queries than it has images left (`EpisodeSampler.left`): the excess is
                drawn from the other classes again (`capped` counts these episodes).
            open_classes: number of further classes, without labelled images, that have Q queries each.

        Raises:
            DataError: there are too few classes, or a class has too few images, or alpha is out of range.
        """
        options: dict[str, Any] = {"mix_groups": mix_groups, "open_classes": max(open_classes, 0)}
        self.episodes = EpisodeSampler(labels, way=way, shot=shot, query=query, seed=seed, **options)
        if dirichlet is not None and unbalanced:
            raise DataError("queries are either unbalanced or drawn from a Dirichlet distribution; choose one")
        if dirichlet is not None and not 0 < dirichlet <= MAX_ALPHA:
            raise DataError(f"alpha of the Dirichlet distribution is {dirichlet:g}; give a number up to {MAX_ALPHA:g}")
        if open_classes < 0 or way + open_classes > len(self.episodes.classes):
            raise DataError(
                f"way {way} and {open_classes} classes without labelled images exceed the "
                f"{len(self.episodes.classes)} classes of the split; lower one of them"
            )
        self.dirichlet, self.open_classes = dirichlet, open_classes
        self.positions = query_positions(way, query, unbalanced)
        self.capped = 0
        """Episodes so far in which a class had fewer images left than were drawn from it."""

    @property
    def queries(self) -> int:
        """P, the queries of an episode."""
        return len(self.positions) + self.open_classes * self.episodes.query

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Episodes start to start + count - 1.

        Returns:
            Row indices of the supports (E, K, S) and of the queries (E, P), and the classes of the queries (E, P), 0 to
            K - 1 in the order of the support, and K for a query of no labelled class.
        """
        drawn = [self._episode(index) for index in range(start, start + count)]
        support, query, truth = zip(*drawn, strict=True)
        return np.stack(support), np.stack(query), np.stack(truth)

    def _episode(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sampler = self.episodes
        episode = sampler.episode(index)
        way, query = episode.query.shape
        rows, truth = episode.query.reshape(-1)[self.positions], self.positions // query
        rng = keyed_rng("query set", sampler.seed, index)
        if self.dirichlet is not None:
            left = sampler.left(episode.classes, episode.support)
            counts = self._counts(rng, np.array([len(members) for members in left]), way * query)
            rows = np.concatenate([rng.permutation(members)[:n] for members, n in zip(left, counts, strict=True)])
            truth = np.repeat(np.arange(way), counts)
        if self.open_classes:
            others = episode.others
            if others is None:
                others = rng.choice(np.setdiff1d(sampler.classes, episode.classes), self.open_classes, replace=False)
            unknown = [rng.choice(members, query, replace=False) for members in sampler.left(others, episode.support)]
            rows = np.concatenate([rows, *unknown])
            truth = np.concatenate([truth, np.full(self.open_classes * query, way)])
        return episode.support, rows, truth

    def _counts(self, rng: np.random.Generator, most: np.ndarray, total: int) -> np.ndarray:
        """Draw the number of queries of each class, (K,); `most` is the number of images that each has left."""
        # The floor keeps the proportions of a tiny alpha, which round to zero, in the game for the excess.
        proportions = np.maximum(rng.dirichlet(np.full(len(most), self.dirichlet)), 1e-12)
        counts = rng.multinomial(total, proportions / proportions.sum())
        self.capped += int((counts > most).any())
        while (excess := int(np.maximum(counts - most, 0).sum())) > 0:
            counts = np.minimum(counts, most)
            free = np.where(counts < most, proportions, 0.0)
            counts += rng.multinomial(excess, free / free.sum())
        return counts
