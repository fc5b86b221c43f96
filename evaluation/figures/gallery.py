"""All figures of one trained model on one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metagmvae.evaluation.figures import plots
from metagmvae.evaluation.figures.mixture_modes import ModeFinder
from metagmvae.evaluation.figures.paper_figures import FIGURES, paper_figure
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import Rows
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel

POOL_SIZE = 4096
"""Images among which the nearest one to decoded features is searched."""
RECONSTRUCTION_SET = 200
"""Images in the set that is reconstructed; the first 16 of them are shown."""


def draw_gallery(
    loaded: LoadedModel, dataset: Dataset, split: str, out: Path, lines: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write all figures that the model, the data and the metric lines allow; return the files.

    A Meta-GMVAE gives Fig. 3 and 4 of the paper and reconstructions; on a dataset of features only Fig. 4, because
    features cannot be shown as images. Every other model gives curves only.

    The unlabelled set is of the training split of the dataset, the labelled episode of `split`. Existing files in `out`
    are replaced. Without metric lines there are no curves.

    Raises:
        DataError: the images have another shape than those of the model, or the split has too few classes or images.
    """
    dataset.split(split)
    figures: dict[str, Figure] = {}
    if isinstance(loaded.model, MetaGMVAE):
        figures[FIGURES[4]] = paper_figure(4, loaded, dataset, split)
        if dataset.kind == "images":
            figures[FIGURES[3]] = paper_figure(3, loaded, dataset, split)
            figures["reconstructions"] = _reconstructions(loaded.model, dataset.images(split), loaded.negative)
    name, files = loaded.settings.name, []
    if any(key == "loss" or key.startswith("validation/") for line in lines for key in line):
        figures["curves"] = plots.curves(lines, name)
        files.append(out / "curves.json")
        write_json(files[-1], {"name": name, "validation": _validation_lines(lines)})
    for stem, figure in figures.items():
        files.append(out / f"{stem}.png")
        plots.save(figure, files[-1])
    return files


def _first(images: Rows, count: int) -> np.ndarray:
    return np.asarray(images[np.arange(min(count, len(images)))])


def _validation_lines(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return step, training time in seconds and validation metrics of the lines that have validation metrics."""
    clock = ("global_step", "elapsed_s")
    return [
        {key: value for key, value in line.items() if key in clock or key.startswith("validation/")}
        for line in lines
        if any(key.startswith("validation/") for key in line)
    ]


def _reconstructions(model: MetaGMVAE, images: Rows, negative: bool) -> Figure:
    finder = ModeFinder(model, _first(images, POOL_SIZE))
    image_set = _first(images, RECONSTRUCTION_SET)
    label = "decoded" if finder.pool_nF is None else "nearest to the\ndecoded features"
    return plots.reconstructions(image_set[:16], finder.reconstruct(image_set)[:16], label, negative=negative)
