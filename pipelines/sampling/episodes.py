"""Labelled K-way S-shot episodes by index: episode i depends on (seed, i) alone.

Notation: K ways, S shots, Q queries per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from metagmvae.pipelines.grouped_labels import (
    NAMED_CLASSES,
    EpisodeLabels,
    GroupedLabels,
    class_ids,
    class_members,
)
from metagmvae.pipelines.records import DataError, Episode, first_few, printable
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.group_draw import MIX, GroupDraw, group_sizes

GroupProtocol = Literal["apart", "mixed"]
"""Labelled images and queries of an episode are of different groups, or drawn regardless of the groups."""


class EpisodeSampler:
    """Draws K classes per episode, and S + Q samples of each class, both without replacement.

    Of a dataset with groups, the labelled images and the queries of an episode are of different groups (`GroupDraw`).
    """

    def __init__(
        self,
        labels: EpisodeLabels,
        *,
        way: int,
        shot: int,
        query: int,
        seed: int,
        mix_groups: bool = False,
        open_classes: int = 0,
    ) -> None:
        """Group the rows by class.

        Args:
            labels: class of every row, and its group if the dataset has groups.
            way, shot, query: K, S and Q.
            seed: seed of all episodes.
            mix_groups: draw regardless of the groups, as for a dataset without them.
            open_classes: number of classes of `Episode.others`, whose queries the draw of the support leaves room for.

        Raises:
            DataError: there are fewer than K classes, a class (with groups: of several) has fewer than S + Q samples,
                or there are no groups to mix.
        """
        if way < 2 or shot < 1 or query < 1:
            raise DataError(f"way {way}, shot {shot}, query {query}: way must be at least 2, the others at least 1")
        self.draw: GroupDraw | None = None
        self.groups = group_protocol(labels, mix_groups)
        """Whether labelled images and queries are of different groups; None: the dataset has no groups."""
        self.left_out: tuple[str, ...] = ()
        """Names of the classes whose groups do not give S labelled images and Q queries."""
        members = class_members(class_ids(labels))
        if way > len(members):
            raise DataError(f"way {way} exceeds the {len(members)} classes of the split; lower the way")
        apart = labels if isinstance(labels, GroupedLabels) and not mix_groups else None
        # Classes of one group are left out, whatever their size.
        smallest = min(members if apart is None else group_sizes(apart), key=lambda c: len(members[c]), default=None)
        if smallest is not None and len(members[smallest]) < shot + query:
            name = smallest if apart is None else printable(apart.class_names[smallest])
            raise DataError(
                f"shot {shot} and query {query} need {shot + query} images per class, but class {name} has "
                f"{len(members[smallest])}; lower shot or query"
            )
        self.way, self.shot, self.query, self.seed, self.open_classes = way, shot, query, seed, open_classes
        self.classes = np.array(sorted(members))
        self.members = members
        if mix_groups and self.groups is None:
            raise DataError("mix_groups: the dataset has no groups; omit this option")
        if apart is not None:
            self.draw = GroupDraw(apart, shot=shot, query=query)
            self.classes, self.left_out = self.draw.classes, self.draw.left_out_names
            if way > len(self.classes):
                without = first_few(self.left_out, shown=NAMED_CLASSES)
                raise DataError(
                    f"way {way} exceeds the {len(self.classes)} classes of the split that have {shot} labelled and "
                    f"{query} other images of different groups (not {without}); lower way, shot or query, give more "
                    f"groups, or {MIX}"
                )

    def episode(self, index: int) -> Episode:
        """Episode `index`, independent of earlier calls."""
        rng = keyed_rng("episode", self.seed, index)
        if self.draw is not None:
            classes, support = self.draw.draw(rng, self.way, self.open_classes)
            labelled, others = classes[: self.way], classes[self.way :]
            left = self.draw.left(labelled, support)
            query = np.stack([rng.choice(rows, size=self.query, replace=False) for rows in left])
            return Episode(index, labelled, support, query, others)
        classes = rng.choice(self.classes, size=self.way, replace=False)
        rows = np.stack(
            [rng.choice(self.members[int(c)], size=self.shot + self.query, replace=False) for c in classes]
        ).astype(np.int64)
        return Episode(index, classes, rows[:, : self.shot], rows[:, self.shot :])

    def left(self, classes: np.ndarray, support: np.ndarray) -> list[np.ndarray]:
        """Rows of each class that can be queries of an episode with this support, sorted."""
        if self.draw is not None:
            return self.draw.left(classes, support)
        return [np.setdiff1d(self.members[int(c)], support) for c in classes]

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Episodes start to start + count - 1: row indices of supports (E, K, S) and queries (E, K, Q)."""
        episodes = [self.episode(index) for index in range(start, start + count)]
        return np.stack([e.support for e in episodes]), np.stack([e.query for e in episodes])


def group_protocol(labels: EpisodeLabels, mix_groups: bool) -> GroupProtocol | None:
    """How episodes are drawn from rows with groups; None: without groups."""
    if not isinstance(labels, GroupedLabels):
        return None
    return "mixed" if mix_groups else "apart"


def left_out_line(what: str, shot: int, query: int, names: Sequence[str]) -> str:
    """A line on the classes that episodes leave out; `what` is done with the episodes."""
    return (
        f"{what} with {shot} shots leaves out classes without {shot} labelled and {query} other images of different "
        f"groups: {first_few(names, shown=NAMED_CLASSES)}"
    )


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
