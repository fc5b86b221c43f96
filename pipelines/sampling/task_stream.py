"""Training tasks of methods that learn from few-shot tasks, read by index: task e depends on (seed, split, e) alone.

Notation: B tasks per step over all W ranks, b = B / W tasks of this rank, K ways, n images per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metagmvae.pipelines.grouped_labels import class_members
from metagmvae.pipelines.records import DataError, Rows, TaskBatch
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.group_draw import GroupDraw
from metagmvae.pipelines.sampling.stream import Stream


class TaskStream(Stream):
    """Tasks of K classes with n different images each; rank r takes tasks r, r + W, ... of each step.

    With groups, the first S images of the classes of a task and the others are of different groups (`GroupDraw`).
    """

    images: Rows

    def __init__(
        self,
        images: Rows,
        partitions: Sequence[np.ndarray],
        *,
        batch: int,
        way: int,
        per_class: int,
        grouped: GroupDraw | None = None,
        **position: Any,
    ) -> None:
        """Group the rows by class; classes with fewer than n images are left out.

        Args:
            images: images or features, by row index.
            partitions: classes of the rows, int64 (rows,), -1 for none. Each task is drawn from one of the partitions.
                Empty: every row is a class of its own, and `per_class` is 1.
            batch: tasks per step over all ranks.
            way: K.
            per_class: n.
            grouped: draws the images of the only partition by its groups; None: there are none.
            position: of the stream, as in `Stream`.

        Raises:
            DataError: there are fewer than K classes of n images, in one of the partitions.
        """
        super().__init__(images, batch=batch, **position)
        self.way, self.per_class = way, per_class
        self.classes = [large_classes(labels, per_class) for labels in partitions]
        self.grouped = grouped
        if grouped is not None and len(grouped.classes) < way:
            raise DataError(
                f"method.way is {way}, but only {len(grouped.classes)} classes of split {self.split!r} have "
                f"{grouped.shot} and {grouped.query} images (method.shot and method.query) of different groups; lower "
                "one of these settings"
            )
        for number, classes in enumerate(self.classes, start=1):
            if len(classes) < way:
                where = f" in partition {number} of {len(partitions)}" if len(partitions) > 1 else ""
                raise DataError(
                    f"method.way is {way}, but only {len(classes)} classes of split {self.split!r} have {per_class} "
                    f"images (method.shot + method.query){where}; lower one of these settings"
                )
        if not self.classes and len(images) < way:
            raise DataError(
                f"method.way is {way}, but split {self.split!r} has only {len(images)} images; lower method.way"
            )

    def at(self, step: int) -> TaskBatch:
        """The tasks of one step on this rank."""
        tasks = np.arange(self.rank, self.batch, self.world, dtype=np.int64) + step * self.batch
        rows = np.concatenate([self.rows(int(task)).reshape(-1) for task in tasks])
        images = self.images[rows]
        return TaskBatch(images.reshape(len(tasks), self.way, self.per_class, *images.shape[1:]), tasks, step)

    def rows(self, task: int) -> np.ndarray:
        """Row indices of one task, int64, (K, n)."""
        rng = keyed_rng("task", self.seed, self.split, task)
        if self.grouped is not None:
            drawn, support = self.grouped.draw(rng, self.way)
            left = self.grouped.left(drawn, support)
            query = [rng.choice(rows, size=self.grouped.query, replace=False) for rows in left]
            return np.concatenate([support, np.stack(query)], axis=1)
        if not self.classes:
            return rng.choice(len(self.images), size=(self.way, 1), replace=False)
        classes = self.classes[rng.integers(len(self.classes))]
        chosen = rng.choice(len(classes), size=self.way, replace=False)
        return np.stack([rng.choice(classes[k], size=self.per_class, replace=False) for k in chosen])


def large_classes(labels: np.ndarray, per_class: int) -> list[np.ndarray]:
    """Return the rows of each class that has at least `per_class` of them, by class; -1 is no class."""
    return [rows for name, rows in class_members(labels).items() if name >= 0 and len(rows) >= per_class]
