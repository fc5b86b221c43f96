"""The figure of `metagmvae classify`: labelled images, and the most certain predictions of each class."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from metagmvae.infra.classification.task_inputs import ImageInputs
from metagmvae.pipelines.records import DataError

SHOWN = 8
"""Images of each class in the figure, labelled and predicted ones."""
SHOWN_CLASSES = 40


class MostCertain:
    """The queries with the highest probability of each class, as many as the figure shows."""

    def __init__(self, classes: int) -> None:
        self.by_class: list[list[tuple[float, str, np.ndarray]]] = [[] for _ in range(classes)]

    def add(self, files: list[str], p_PK: np.ndarray) -> None:
        """Add classified files; those of no labelled class are not shown."""
        for file, row in zip(files, p_PK, strict=True):
            k = int(row.argmax())
            if k < len(self.by_class):
                ranked = sorted([*self.by_class[k], (float(row[k]), file, row)], key=lambda item: -item[0])
                self.by_class[k] = ranked[:SHOWN]


def draw_answer(inputs: ImageInputs, images: np.ndarray, best: MostCertain, classified: int, figure: Path) -> None:
    """Draw the figure.

    Args:
        inputs: of the task.
        images: the labelled images as the model takes them.
        best: of the queries.
        classified: number of classified queries.
        figure: PNG file.
    """
    from metagmvae.evaluation.figures import plots

    names = inputs.names[:SHOWN_CLASSES]
    support = [images[inputs.label_T == k][:SHOWN] for k in range(len(names))]
    chosen, pixels = [], []
    for item in (item for ranked in best.by_class[: len(names)] for item in ranked):
        with suppress(DataError):  # removed since it was classified
            pixels.append(inputs.query(item[1]))
            chosen.append(item)
    shown = np.stack(pixels) if pixels else images[:0]
    p_PK = np.array([row[: len(names)] for _, _, row in chosen]).reshape(len(chosen), len(names))
    note = f"{len(chosen):,} of {classified:,} images"
    if len(names) < len(inputs.names):
        note += f", {len(names)} of {len(inputs.names)} classes"
    negative = inputs.preprocessing.invert if inputs.recorded else inputs.preprocessing.channels == 1
    plots.save(plots.predictions(support, names, shown, p_PK, note, negative=negative), figure)
