"""What episodes are drawn from: the class of each row of a split, and its group, such as the patient, if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metagmvae.pipelines.records import first_few, printable

NAMED_CLASSES = 10
"""Classes that a message names at most; it gives the number of the others."""


@dataclass(frozen=True)
class GroupedLabels:
    """Classes and groups of the rows of a split whose dataset has groups."""

    classes: np.ndarray
    """Class id of each row, int64, (n,)."""
    groups: np.ndarray
    """Group of each row, int64 from 0, (n,)."""
    class_names: Sequence[str]
    """By class id."""


EpisodeLabels = np.ndarray | GroupedLabels
"""Class id of each row, int64 (n,); with the groups, if the dataset has groups."""


def class_ids(labels: EpisodeLabels) -> np.ndarray:
    """Class id of each row, int64, (n,)."""
    return labels.classes if isinstance(labels, GroupedLabels) else labels


def class_members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Row indices of each class, by its id in increasing order."""
    order = np.argsort(labels, kind="stable")
    ids, starts = np.unique(labels[order], return_index=True)
    # Not strict: np.split returns one empty part for an empty split.
    return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=False))


def one_group_classes(splits: Sequence[str], classes: Sequence[str], groups: Sequence[str]) -> str:
    """Name some classes of validation and test whose images are all of one group; empty if there are none."""
    found: dict[tuple[str, str], set[str]] = {}
    for split, name, group in zip(splits, classes, groups, strict=True):
        if split != "train":
            found.setdefault((split, name), set()).add(group)
    alone = [f"{printable(name)} ({split})" for (split, name), inside in sorted(found.items()) if len(inside) < 2]
    return first_few(alone, shown=NAMED_CLASSES)


def number_groups(groups: Sequence[str]) -> list[int]:
    """Replace names of groups by numbers from 0, in the order of their first row."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]
