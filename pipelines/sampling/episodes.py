"""Labelled K-way S-shot episodes by index: episode i depends on (seed, i) only.

Notation: K ways, S shots, Q queries per class.
"""

from __future__ import annotations

import numpy as np

from metagmvae.pipelines.records import DataError, Episode
from metagmvae.pipelines.rng import keyed_rng


class EpisodeSampler:
    """Draws K classes, and S + Q different samples of each, without replacement."""

    def __init__(
        self, labels: np.ndarray, *, way: int, shot: int, query: int, seed: int, skip_small: bool = False
    ) -> None:
        """Take the class id of every row.

        Args:
            labels: int64, (n,).
            way, shot, query: K, S and Q.
            seed: of all episodes.
            skip_small: leave out classes with fewer than S + Q samples instead of refusing.

        Raises:
            DataError: there are fewer than K classes, or a class has fewer than S + Q samples; says how many.
        """
        if way < 2 or shot < 1 or query < 1:
            raise DataError(f"way {way}, shot {shot}, query {query}: way must be 2 or more, the others 1 or more")
        order = np.argsort(labels, kind="stable")
        ids, starts = np.unique(labels[order], return_index=True)
        members = dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=True))
        if skip_small:
            members = {c: rows for c, rows in members.items() if len(rows) >= shot + query}
        if way > len(members):
            raise DataError(f"{way} ways were asked for and there are {len(members)} classes: lower the way")
        smallest = min(members, key=lambda c: len(members[c]))
        if len(members[smallest]) < shot + query:
            raise DataError(
                f"{shot} shots and {query} queries need {shot + query} images of a class, and class {smallest} "
                f"has {len(members[smallest])}: lower the shot or the query"
            )
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        self.classes = np.array(sorted(members))
        self.members = members

    def episode(self, index: int) -> Episode:
        """Episode `index`, the same whatever was drawn before."""
        rng = keyed_rng("episode", self.seed, index)
        classes = rng.choice(self.classes, size=self.way, replace=False)
        rows = np.stack(
            [rng.choice(self.members[int(c)], size=self.shot + self.query, replace=False) for c in classes]
        ).astype(np.int64)
        return Episode(index, classes, rows[:, : self.shot], rows[:, self.shot :])

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Episodes start .. start + count - 1 stacked: support rows (E, K, S), query rows (E, K, Q)."""
        episodes = [self.episode(index) for index in range(start, start + count)]
        return np.stack([e.support for e in episodes]), np.stack([e.query for e in episodes])
