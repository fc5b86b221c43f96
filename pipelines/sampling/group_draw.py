"""Draws labelled images such that no group, such as a patient, has both a labelled image and a query in an episode.

The images of a class are drawn one after the other, class by class, each with equal probability from the images whose
group has a labelled image already, or may get one. A group may get one if afterwards each class of the episode, by
itself, can still have S labelled images and Q queries of other groups. The queries of a class are then drawn with
equal probability from the images of the groups without a labelled image in any class.

So every group with one image gives the episodes of a dataset without groups. Where classes share groups, a class may
find no image left that it may draw: then the whole episode is drawn again.

Notation: K ways, N classes without labelled images, S shots, Q queries per class.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np

from metagmvae.pipelines.grouped_labels import EpisodeLabels, GroupedLabels, class_members
from metagmvae.pipelines.records import DataError, printable

MOST_DRAWS = 1000
"""Draws of one episode before it counts as impossible."""
MIX = "draw regardless of the groups (--mix-groups; in a training, validation.mix_groups)"
"""Remedy where the groups do not suffice."""


class GroupDraw:
    """Classes and labelled images of episodes.

    Args:
        labels: classes and groups of all rows; classes -1 are none.
        shot: S.
        query: Q.
    """

    def __init__(self, labels: GroupedLabels, *, shot: int, query: int) -> None:
        self.labels, self.shot, self.query = labels, shot, query
        self.members = {c: rows for c, rows in class_members(labels.classes).items() if c >= 0}
        self.group_of: list[int] = labels.groups.tolist()
        self.groups = int(labels.groups.max(initial=-1)) + 1
        self.classes_of: list[dict[int, int]] = [{} for _ in range(self.groups)]
        """Images of each class in each group."""
        self.sizes: dict[int, dict[int, int]] = {}
        """Images of each group in each class."""
        for c, rows in self.members.items():
            found, counts = np.unique(labels.groups[rows], return_counts=True)
            self.sizes[c] = dict(zip(found.tolist(), counts.tolist(), strict=True))
            for group, count in self.sizes[c].items():
                self.classes_of[group][c] = count
        self.largest = {c: max(sizes.values()) for c, sizes in self.sizes.items()}
        possible = {c: self._fits(c, shot, len(rows) - query) for c, rows in self.members.items()}
        self.classes = np.array([c for c in possible if possible[c]], dtype=np.int64)
        self.left_out = [c for c in possible if not possible[c]]
        """Classes whose groups do not give S labelled images and Q queries."""

    @property
    def left_out_names(self) -> tuple[str, ...]:
        """Names of these classes."""
        return tuple(printable(self.labels.class_names[c]) for c in self.left_out)

    def draw(self, rng: np.random.Generator, way: int, open_classes: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draw the classes of an episode, (K + N,), of which the first K are labelled, and their support, (K, S).

        Raises:
            DataError: `MOST_DRAWS` draws fail, because the classes share groups.
        """
        for _ in range(MOST_DRAWS):
            classes = rng.choice(self.classes, size=way + open_classes, replace=False)
            support = self._support(rng, classes.tolist(), way)
            if support is not None:
                return classes, support
        raise DataError(
            f"way {way}, shot {self.shot} and query {self.query}: {MOST_DRAWS:,} draws gave no episode with labelled "
            f"images and queries of different groups, because the classes share the {self.groups} groups of the split; "
            f"lower one of them, give more groups, or {MIX}"
        )

    def left(self, classes: Iterable[int], support: np.ndarray) -> list[np.ndarray]:
        """Rows of each class in groups without a row of the support."""
        closed = np.zeros(self.groups, bool)
        closed[self.labels.groups[support]] = True
        rows = [self.members[int(c)] for c in classes]
        return [members[~closed[self.labels.groups[members]]] for members in rows]

    def _support(self, rng: np.random.Generator, classes: Sequence[int], way: int) -> np.ndarray | None:
        """Draw the support of the first K classes; None if one of them finds no image."""
        # By class: labelled images that it lacks beyond those of closed groups, and open images that it can spare.
        lacks = {c: self.shot if k < way else 0 for k, c in enumerate(classes)}
        spare = {c: len(self.members[c]) - self.query for c in classes}
        group_of, closed, refused = self.group_of, set[int](), set[int]()
        support = []
        for c in classes[:way]:
            taken: list[int] = []
            for row in self._in_random_order(rng, c):
                group = group_of[row]
                if group not in closed:
                    if group in refused or not self._close(group, closed, lacks, spare):
                        refused.add(group)
                        continue
                    closed.add(group)
                taken.append(row)
                if len(taken) == self.shot:
                    break
            else:
                return None
            support.append(taken)
        return np.array(support, dtype=np.int64)

    def _in_random_order(self, rng: np.random.Generator, c: int) -> Iterator[int]:
        """The rows of a class. Few are drawn first, since the others are seldom needed."""
        members = self.members[c]
        few = rng.choice(members, size=min(2 * self.shot, len(members)), replace=False)
        yield from few.tolist()
        yield from rng.permutation(np.setdiff1d(members, few)).tolist()

    def _close(self, group: int, closed: set[int], lacks: dict[int, int], spare: dict[int, int]) -> bool:
        """Give a group to the labelled images, if each class of the episode can still be completed."""
        images = self.classes_of[group]
        affected = [c for c in images if c in spare] if len(images) < len(spare) else [c for c in spare if c in images]
        for c in affected:
            if not self._fits(c, lacks[c] - images[c], spare[c] - images[c], closed, group):
                return False
        for c in affected:
            lacks[c] -= images[c]
            spare[c] -= images[c]
        return True

    def _fits(self, c: int, lacks: int, spare: int, closed: Container[int] = (), group: int = -1) -> bool:
        """Whether some groups of a class have between `lacks` and `spare` images together.

        Args:
            c: the class.
            lacks, spare: numbers of images.
            closed, group: groups that are not counted; the others have `spare` + Q images.
        """
        if lacks <= 0:
            return spare >= 0
        if spare - lacks >= self.largest[c] - 1:  # groups added one by one cannot jump over the interval
            return True
        if spare < lacks:
            return False
        sums = subset_sums(size for g, size in self.sizes[c].items() if g != group and g not in closed)
        return bool(sums >> lacks & (1 << spare - lacks + 1) - 1)


def subset_sums(sizes: Iterable[int]) -> int:
    """All sums of some of the sizes, as a number with bit n set for sum n."""
    sums = 1
    for size in sizes:
        sums |= sums << size
    return sums


def group_sizes(labels: EpisodeLabels) -> dict[int, list[int]]:
    """Images of each group in each class that has two groups at least, by class.

    Without groups, every image is a group of its own, and no class is left out.
    """
    if not isinstance(labels, GroupedLabels):
        return {c: [1] * len(rows) for c, rows in class_members(labels).items()}
    counts = {c: np.unique_counts(labels.groups[rows]).counts for c, rows in class_members(labels.classes).items()}
    return {c: sizes.tolist() for c, sizes in counts.items() if len(sizes) > 1}


def most_queries(sizes: Sequence[int], shot: int) -> int:
    """Return the most queries of a class beside S labelled images of other groups; -1 if it has too few images.

    Args:
        sizes: images of each of its groups.
        shot: S.
    """
    if max(sizes) == 1:
        return max(len(sizes) - shot, -1)
    enough = subset_sums(sizes) >> shot
    # The lowest set bit is the smallest sum of at least S.
    return sum(sizes) - shot - (enough & -enough).bit_length() + 1 if enough else -1
