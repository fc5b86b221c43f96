"""Labelled K-way S-shot episodes by index: episode i depends on (seed, i) alone.

Notation: K ways, S shots, Q queries per class.
"""

from __future__ import annotations

import numpy as np

from metagmvae.pipelines.records import DataError, Episode
from metagmvae.pipelines.rng import keyed_rng


class EpisodeSampler:
    """Draws K classes per episode, and S + Q samples of each class, both without replacement."""

    def __init__(self, labels: np.ndarray, *, way: int, shot: int, query: int, seed: int) -> None:
        """Group the rows by class.

        Args:
            labels: class id of every row, int64, (n,).
            way, shot, query: K, S and Q.
            seed: seed of all episodes.

        Raises:
            DataError: there are fewer than K classes, or a class has fewer than S + Q samples.
        """
        if way < 2 or shot < 1 or query < 1:
            raise DataError(f"way {way}, shot {shot}, query {query}: way must be at least 2, the others at least 1")
        members = class_members(labels)
        if way > len(members):
            raise DataError(f"way {way} exceeds the {len(members)} classes of the split; lower the way")
        smallest = min(members, key=lambda c: len(members[c]))
        if len(members[smallest]) < shot + query:
            raise DataError(
                f"shot {shot} and query {query} need {shot + query} images per class, but class {smallest} has "
                f"{len(members[smallest])}; lower shot or query"
            )
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        self.classes = np.array(sorted(members))
        self.members = members

    def episode(self, index: int) -> Episode:
        """Episode `index`, independent of earlier calls."""
        rng = keyed_rng("episode", self.seed, index)
        classes = rng.choice(self.classes, size=self.way, replace=False)
        rows = np.stack(
            [rng.choice(self.members[int(c)], size=self.shot + self.query, replace=False) for c in classes]
        ).astype(np.int64)
        return Episode(index, classes, rows[:, : self.shot], rows[:, self.shot :])

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Episodes start to start + count - 1: row indices of supports (E, K, S) and queries (E, K, Q)."""
        episodes = [self.episode(index) for index in range(start, start + count)]
        return np.stack([e.support for e in episodes]), np.stack([e.query for e in episodes])


def class_members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Row indices of each class, by its id in increasing order."""
    order = np.argsort(labels, kind="stable")
    ids, starts = np.unique(labels[order], return_index=True)
    # Not strict: np.split returns one empty part for an empty split.
    return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=False))


def query_positions(way: int, query: int, unbalanced: bool = False) -> np.ndarray:
    """Positions of the evaluated queries among the way * query queries of an episode, (P,).

    Args:
        way: K.
        query: Q.
        unbalanced: the first half of the classes, rounded down, keeps all its queries and the others keep one each. The
            classes of an episode are in random order.
    """
    positions_KQ = np.arange(way * query).reshape(way, query)
    if not unbalanced:
        return positions_KQ.reshape(-1)
    return np.concatenate([positions_KQ[: way // 2].reshape(-1), positions_KQ[way // 2 :, 0]])
