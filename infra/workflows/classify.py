"""Classification of image files or vectors from a few labelled ones: from a few queries to hundreds of thousands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.evaluation.encoders.head_model import answer_mode
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.evaluation.uncertainty.evaluate_open_task import require_background
from metagmvae.infra.classification.answer_figure import MostCertain, draw_answer
from metagmvae.infra.classification.classified_rows import UNKNOWN, Row, RowFormat, open_table
from metagmvae.infra.classification.encoder_head import head_record, loaded_with_head
from metagmvae.infra.classification.task_inputs import ImageInputs, TaskInputs, VectorInputs
from metagmvae.pipelines.arrays.vector_files import SUFFIXES
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.meta_learner import PredictionMode
from metagmvae.training.trainer.package import LoadedModel, require_learner

FILES_PER_BATCH = 256
"""Queries that are read and encoded at a time: what bounds the memory."""
LARGEST_SET = 500
"""Most queries that are classified together: the attention over a set takes memory and time by its square."""


@dataclass(frozen=True)
class ClassifyOptions:
    """How queries are classified, and what of the answer is written."""

    mode: PredictionMode = "transductive"
    """Transductive: sets of up to `LARGEST_SET` queries are classified together. Inductive: each alone, so the answer
    for an image does not depend on the others."""
    recursive: bool = False
    """Also the images in sub-folders of the folder of queries."""
    unknown: bool = False
    """Whether a query may be of no labelled class; the model needs a background level."""
    top_k: int | None = None
    """Only the most probable classes, this many; None: the probability of each class."""
    threshold: float = 0.0
    """Images whose highest probability is below this get no class."""
    invert: bool | None = None
    """Whether to invert the images; None: as recorded, and not for a model without a record."""
    table: Path | None = None
    """File for the rows, `.csv`, `.parquet` or `.jsonl`; the answer then has only counts."""
    figure: Path | None = None
    """PNG file to draw labelled images and the most certain predictions of each class into."""
    head: str | None = None
    """Classifier on the features of an encoder alone, a key of `evaluation.encoders.heads.HEADS`; None: nearest mean.
    It has its own mode."""
    head_data: Dataset | None = None
    """Data set whose validation classes choose the settings of the head and calibrate it; None: those that the encoder
    was calibrated with, or the defaults."""
    labels: Path | None = None
    """CSV file with the classes of the labelled images; None: they are in class folders."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            DataError: one is out of range.
        """
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"--top-k {self.top_k}: must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise DataError(f"--threshold {self.threshold:g}: is a probability, from 0 to 1")


@dataclass(frozen=True)
class _Task:
    """The labelled examples, encoded, and how to classify with them."""

    loaded: LoadedModel
    inputs: TaskInputs
    device: torch.device
    h_TF: Tensor
    options: ClassifyOptions

    def probabilities(self, h_PF: Tensor) -> np.ndarray:
        """Return the calibrated probabilities of some queries, (P, K), or (P, K + 1) with `unknown`."""
        model, adapt = require_learner(self.loaded, self.loaded.settings.name), self.loaded.settings.adapt
        mode, way, label_T = self.options.mode, len(self.inputs.names), self.inputs.label_T
        shot, background = len(label_T) / way, None
        calibration = self.loaded.calibration_map(adapt, mode, way, shot)
        if self.options.unknown:
            calibration = fit = require_background(self.loaded, mode, way, shot, self.loaded.settings.name)
            background = fit.background
        options: dict[str, Any] = {"calibration": calibration, "background": background}
        p_PK = predict_queries(model, adapt, self.h_TF, label_T, h_PF, mode=mode, **options)
        return p_PK.cpu().numpy()


def classify_folders(
    loaded: LoadedModel,
    support: Path,
    query: Path,
    options: ClassifyOptions | None = None,
    progress: ProgressBar = no_progress,
) -> dict[str, Any]:
    """Classify image files or vectors, on a GPU if there is one; return the answer of `metagmvae classify`.

    The preprocessing that the model records is applied to all images, as `metagmvae prepare` applied it to the
    training images. Memory is bounded by a batch of images and the features of the queries.

    Args:
        loaded: the model.
        support: folder or archive that holds `<class>/*.png` for two or more classes; with `labels`, images in any
            sub-folders. Shots may differ between classes. For a model of vectors: file of vectors with labels.
        query: folder or archive that holds `*.png`, or one image file; or a file of vectors.
        options: how they are classified, and what is written; None: the defaults.
        progress: opens a progress bar.

    Returns:
        `classes`: names; `shots`: labelled images of each class; `preprocessing`: what was done to the images, and
        whether the model records it; `calibrated`: whether the probabilities are calibrated; `images`: number of
        queries; `predicted`: their number by class; `below_threshold`: those without a class; `sets`: sets that were
        classified together, if more than one; `queries`: the rows of `classified_rows.RowFormat`, or `table`: the file
        that holds them; `left_out`: files that were not classified, with reasons; `blank`: images of one single value;
        `figure`: the path of the figure, if drawn; `head`: of an encoder alone, its name, settings and how they were
        chosen.

    Raises:
        DataError: a folder is missing or holds no images, a labelled image cannot be read, the model has no background
            level that is asked for, or an option is not for such a model.
    """
    options = options or ClassifyOptions()
    inputs = _open_inputs(loaded, support, query, options)
    names, label_T = inputs.names, inputs.label_T
    if options.unknown and UNKNOWN in names:
        kind = "class folder" if inputs.kind == "images" else "class"
        raise DataError(f"{support}: {kind} {UNKNOWN!r} has the name of the answer of --unknown; rename it")
    way = len(names)
    sizes = (way, max(1, round(len(label_T) / way)))
    head_options: Any = (options.head, options.head_data, options.mode, sizes)
    loaded = loaded_with_head(loaded, *head_options, unknown=options.unknown)
    model = require_learner(loaded, loaded.settings.name)
    options, device = replace(options, mode=answer_mode(model, options.mode)), default_device()
    examples = inputs.support()
    task = _Task(loaded, inputs, device, encode_images(model.to(device), examples, device), options)
    answers = [*names, UNKNOWN] if options.unknown else names
    row_format = RowFormat(names, options.unknown, options.top_k, options.threshold)
    rows: list[Row] = []
    counts, best = Counter[str | None](), MostCertain(way)
    with ExitStack() as stack:
        write = stack.enter_context(open_table(options.table, row_format)) if options.table else rows.extend
        on_progress = stack.enter_context(progress(inputs.kind))
        for batch, p_PK in _classified(task):
            new = row_format.rows(batch, p_PK)
            counts.update(row["class"] for row in new)
            best.add(batch, p_PK)
            write(new)
            if on_progress is not None:
                on_progress(sum(counts.values()), len(inputs.queries))
    classified, about = sum(counts.values()), inputs.about
    answer: dict[str, Any] = {
        "classes": names,
        "shots": np.bincount(label_T).tolist(),
        **({"preprocessing": about.pop("preprocessing")} if "preprocessing" in about else {}),
        "calibrated": loaded.calibration is not None,
        **head_record(loaded, way, len(label_T) / way),
        "mode": options.mode,
        inputs.kind: classified,
        "predicted": {name: counts[name] for name in answers},
        **({"below_threshold": counts[None]} if options.threshold else {}),
        **({"sets": -(-classified // LARGEST_SET)} if _in_sets(options, len(inputs.queries)) else {}),
        **({"table": str(options.table)} if options.table else {"queries": rows}),
        **about,
    }
    if options.figure is not None:
        assert isinstance(inputs, ImageInputs)  # checked by _open_inputs
        draw_answer(inputs, examples, best, classified, options.figure)
        answer["figure"] = str(options.figure)
    return answer


def _open_inputs(loaded: LoadedModel, support: Path, query: Path, options: ClassifyOptions) -> TaskInputs:
    """List image files, or open vectors, as the model takes them.

    Raises:
        DataError: as `classify_folders`.
    """
    if loaded.model.takes_vectors:
        for option in ("recursive", "figure", "invert", "labels"):
            if getattr(options, option) not in (None, False):
                raise DataError(f"--{option}: is for images, and {loaded.settings.name} takes vectors; omit it")
        return VectorInputs.open(loaded.model, support, query)
    for path in (support, query):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            raise DataError(f"{path}: is a file of vectors, and {loaded.settings.name} takes images; give a folder")
    preprocessing, recorded = image_preprocessing(loaded, options.invert), loaded.preprocessing is not None
    return ImageInputs(support, query, preprocessing, recorded, options.recursive, options.labels)


def image_preprocessing(loaded: LoadedModel, invert: bool | None = None) -> Preprocessing:
    """Return the preprocessing of image files for a model: the recorded one, or only crop and resize without a record.

    Args:
        loaded: the model.
        invert: replaces the inversion; None: as recorded.
    """
    recorded = loaded.preprocessing or Preprocessing.of_shape(loaded.image_shape, invert=False)
    return recorded if invert is None else recorded.model_copy(update={"invert": invert})


def _in_sets(options: ClassifyOptions, queries: int) -> bool:
    """Whether the queries are too many to be classified together."""
    return options.mode == "transductive" and queries > LARGEST_SET


def _classified(task: _Task) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield names of queries and their probabilities, in their order; in random sets if they are too many for one."""
    if task.options.mode == "inductive":
        for batch, h_PF in _encoded(task):
            yield batch, task.probabilities(h_PF)
        return
    read, features = [], []
    for batch, h_PF in _encoded(task):
        read += batch
        features.append(h_PF)
    h_nF = torch.cat(features)
    number = -(-len(read) // LARGEST_SET)
    # A random set has about the class proportions of all queries; files of one class are often neighbours by name.
    order = keyed_rng("classify sets").permutation(len(read)) if number > 1 else np.arange(len(read))
    parts = [np.sort(part) for part in np.array_split(order, number)]
    found = [task.probabilities(h_nF[torch.as_tensor(part)]) for part in parts]
    p_nK = np.concatenate(found)[np.argsort(np.concatenate(parts))]
    for first in range(0, len(read), FILES_PER_BATCH):
        yield read[first : first + FILES_PER_BATCH], p_nK[first : first + FILES_PER_BATCH]


def _encoded(task: _Task) -> Iterator[tuple[list[str], Tensor]]:
    """Yield batches of queries with their features."""
    for batch, queries in task.inputs.batches(FILES_PER_BATCH):
        yield batch, encode_images(task.loaded.model, queries, task.device)
