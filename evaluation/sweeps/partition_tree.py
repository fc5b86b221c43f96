"""A regression tree as boxes that fill [0, 1]^d: exact means over its dimensions (Hutter et al. 2014, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray


class PartitionTree:
    """The leaves of a tree of scikit-learn as boxes.

    The tree is f(u) = sum over leaves l of v_l 1[u in box l]. Its marginal over all dimensions but j is piecewise
    constant: a_j(u_j) = sum over l of v_l vol_-j(l) 1[u_j in side j of box l]; of two dimensions likewise.
    """

    def __init__(self, tree: Any, levels: Sequence[int]) -> None:
        """Read a fitted tree.

        Args:
            tree: `estimator.tree_`.
            levels: number of levels of each dimension, each an equal part of [0, 1] that no box may cut; 0: real.
        """
        low, high = _boxes(tree, levels)
        leaves = tree.children_left < 0
        self.low, self.high = low[leaves], high[leaves]
        """(leaves, d) each."""
        self.values = tree.value[leaves, 0, 0]
        volumes = np.prod(self.high - self.low, axis=1)
        self.mean = float(volumes @ self.values)
        self.variance = float(volumes @ (self.values - self.mean) ** 2)
        """Over the whole space, evenly weighted."""
        self._alone: dict[int, float] = {}

    def marginal(self, *dimensions: int) -> tuple[list[Array], Array]:
        """Edges of the cells along each dimension, (cells + 1,), and the marginal in every cell."""
        edges = [np.unique(np.concatenate((self.low[:, j], self.high[:, j]))) for j in dimensions]
        others = [j for j in range(self.low.shape[1]) if j not in dimensions]
        parts = self.values * np.prod(self.high[:, others] - self.low[:, others], axis=1)
        # What a box adds to a block of cells is written at its corners only; running sums spread it over the block.
        shape = tuple(len(edge) for edge in edges)
        cells = np.zeros(shape)
        starts = [np.searchsorted(edge, self.low[:, j]) for edge, j in zip(edges, dimensions, strict=True)]
        ends = [np.searchsorted(edge, self.high[:, j]) for edge, j in zip(edges, dimensions, strict=True)]
        for corner in np.ndindex((2,) * len(dimensions)):
            at = tuple(ends[axis] if far else starts[axis] for axis, far in enumerate(corner))
            np.add.at(cells, at, parts * (-1) ** sum(corner))
        for axis in range(len(dimensions)):
            cells = np.cumsum(cells, axis=axis)
        return edges, cells[tuple(slice(0, -1) for _ in dimensions)]

    def variance_of(self, j: int) -> float:
        """Variance of the marginal of one dimension."""
        if j not in self._alone:
            (edges,), cells = self.marginal(j)
            self._alone[j] = float(np.diff(edges) @ (cells - self.mean) ** 2)
        return self._alone[j]

    def variance_of_pair(self, i: int, j: int) -> float:
        """Variance of the marginal of two dimensions, less what each of them has alone."""
        (first, second), cells = self.marginal(i, j)
        both = np.diff(first) @ (cells - self.mean) ** 2 @ np.diff(second)
        return max(0.0, float(both) - self.variance_of(i) - self.variance_of(j))


def _boxes(tree: Any, levels: Sequence[int]) -> tuple[Array, Array]:
    """Lower and upper corners of the box of every node, (nodes, d) each, from the root down, a depth at a time."""
    low, high = np.zeros((tree.node_count, len(levels))), np.ones((tree.node_count, len(levels)))
    cuts, level_counts = tree.threshold.copy(), np.asarray(levels)[tree.feature]
    listed = (tree.children_left >= 0) & (level_counts > 0)
    # Level k stands at (k + 0.5) / n; a threshold between two levels that a node has seen may cut one that it has not.
    counts = level_counts[listed]
    cuts[listed] = (np.floor(cuts[listed] * counts - 0.5) + 1) / counts
    nodes = np.array([0])
    while nodes.size:
        nodes = nodes[tree.children_left[nodes] >= 0]
        left, right, j = tree.children_left[nodes], tree.children_right[nodes], tree.feature[nodes]
        for children in (left, right):
            low[children], high[children] = low[nodes], high[nodes]
        high[left, j] = cuts[nodes]
        low[right, j] = cuts[nodes]
        nodes = np.concatenate((left, right))
    return low, high
