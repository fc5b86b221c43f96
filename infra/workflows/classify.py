"""Classification of image files from a few labelled image files in class folders: a few files, or hundred thousands."""

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
from metagmvae.infra.classification.classified_rows import UNKNOWN, Row, RowFormat, open_table
from metagmvae.infra.classification.encoder_head import head_record, loaded_with_head
from metagmvae.infra.classification.labelled_files import labelled_files, path_of, query_files
from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.meta_learner import PredictionMode
from metagmvae.training.trainer.package import LoadedModel, require_learner

FILES_PER_BATCH = 256
"""Image files that are decoded and encoded at a time: what bounds the memory."""
LARGEST_SET = 500
"""Most queries that are classified together: the attention over a set takes memory and time by its square."""
SHOWN = 8
"""Images of each class in the figure, labelled and predicted ones."""
SHOWN_CLASSES = 40


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
    """The labelled images, encoded, and how to classify with them."""

    loaded: LoadedModel
    preprocessing: Preprocessing
    device: torch.device
    names: list[str]
    h_TF: Tensor
    label_T: np.ndarray
    options: ClassifyOptions

    def probabilities(self, h_PF: Tensor) -> np.ndarray:
        """Return the calibrated probabilities of some queries, (P, K), or (P, K + 1) with `unknown`."""
        model, adapt = require_learner(self.loaded, self.loaded.settings.name), self.loaded.settings.adapt
        mode, way = self.options.mode, len(self.names)
        shot, background = len(self.label_T) / way, None
        calibration = self.loaded.calibration_map(adapt, mode, way, shot)
        if self.options.unknown:
            calibration = fit = require_background(self.loaded, mode, way, shot, self.loaded.settings.name)
            background = fit.background
        options: dict[str, Any] = {"calibration": calibration, "background": background}
        p_PK = predict_queries(model, adapt, self.h_TF, self.label_T, h_PF, mode=mode, **options)
        return p_PK.cpu().numpy()


def classify_folders(
    loaded: LoadedModel,
    support: Path,
    query: Path,
    figure: Path | None = None,
    invert: bool | None = None,
    options: ClassifyOptions | None = None,
    progress: ProgressBar = no_progress,
) -> dict[str, Any]:
    """Classify image files, on a GPU if there is one; return the answer of `metagmvae classify`.

    The preprocessing that the model records is applied to all images, as `metagmvae prepare` applied it to the
    training images. Memory is bounded by a batch of images and the features of the queries.

    Args:
        loaded: the model.
        support: folder or archive that holds `<class>/*.png` for two or more classes; shots may differ between classes.
        query: folder or archive that holds `*.png`, or one image file.
        figure: as in `ClassifyOptions`.
        invert: as in `ClassifyOptions`.
        options: all options; `figure` and `invert` are then ignored.
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
    options = options or ClassifyOptions(figure=figure, invert=invert)
    names, support_files, label_T, left_out = labelled_files(support)
    query, files, queries_left_out = query_files(query, recursive=options.recursive)
    if options.unknown and UNKNOWN in names:
        raise DataError(f"{support}: class folder {UNKNOWN!r} has the name of the answer of --unknown; rename it")
    way = len(names)
    sizes = (way, max(1, round(len(label_T) / way)))
    head_options: Any = (options.head, options.head_data, options.mode, sizes)
    loaded = loaded_with_head(loaded, *head_options, unknown=options.unknown)
    model = require_learner(loaded, loaded.settings.name)
    options = replace(options, mode=answer_mode(model, options.mode))
    preprocessing, device = image_preprocessing(loaded, options.invert), default_device()
    blank: list[str] = []
    images = np.stack([_read(support, file, preprocessing, blank) for file in support_files])
    h_TF = encode_images(model.to(device), images, device)
    task = _Task(loaded, preprocessing, device, names, h_TF, label_T, options)
    answers = [*names, UNKNOWN] if options.unknown else names
    row_format = RowFormat(names, options.unknown, options.top_k, options.threshold)
    rows: list[Row] = []
    counts, best = Counter[str | None](), _MostCertain(way)
    with ExitStack() as stack:
        write = stack.enter_context(open_table(options.table, row_format)) if options.table else rows.extend
        on_progress = stack.enter_context(progress("images"))
        for batch, p_PK in _classified(task, query, files, blank, queries_left_out):
            new = row_format.rows(batch, p_PK)
            counts.update(row["class"] for row in new)
            best.add(batch, p_PK)
            write(new)
            if on_progress is not None:
                on_progress(sum(counts.values()), len(files))
    classified = sum(counts.values())
    if not classified:
        raise DataError(f"{query}: none of its {len(files)} images can be read; {queries_left_out[-1]['reason']}")
    answer: dict[str, Any] = {
        "classes": names,
        "shots": np.bincount(label_T).tolist(),
        "preprocessing": preprocessing.model_dump(mode="json") | {"recorded": loaded.preprocessing is not None},
        "calibrated": loaded.calibration is not None,
        **head_record(loaded, way, len(label_T) / way),
        "mode": options.mode,
        "images": classified,
        "predicted": {name: counts[name] for name in answers},
        **({"below_threshold": counts[None]} if options.threshold else {}),
        **({"sets": -(-classified // LARGEST_SET)} if _in_sets(options, len(files)) else {}),
        **({"table": str(options.table)} if options.table else {"queries": rows}),
        "left_out": left_out + queries_left_out,
        "blank": blank,
    }
    if options.figure is not None:
        _draw(task, images, query, best, classified, options.figure)
        answer["figure"] = str(options.figure)
    return answer


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


def _classified(
    task: _Task, query: Path, files: list[str], blank: list[str], left_out: list[dict[str, str]]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield files and their probabilities, in the order of the files; in random sets if they are too many for one."""
    if task.options.mode == "inductive":
        for batch, h_PF in _encoded(task, query, files, blank, left_out):
            yield batch, task.probabilities(h_PF)
        return
    read, features = [], []
    for batch, h_PF in _encoded(task, query, files, blank, left_out):
        read += batch
        features.append(h_PF)
    if not read:
        return
    h_nF = torch.cat(features)
    number = -(-len(read) // LARGEST_SET)
    # A random set has about the class proportions of all queries; files of one class are often neighbours by name.
    order = keyed_rng("classify sets").permutation(len(read)) if number > 1 else np.arange(len(read))
    parts = [np.sort(part) for part in np.array_split(order, number)]
    found = [task.probabilities(h_nF[torch.as_tensor(part)]) for part in parts]
    p_nK = np.concatenate(found)[np.argsort(np.concatenate(parts))]
    for first in range(0, len(read), FILES_PER_BATCH):
        yield read[first : first + FILES_PER_BATCH], p_nK[first : first + FILES_PER_BATCH]


def _encoded(
    task: _Task, query: Path, files: list[str], blank: list[str], left_out: list[dict[str, str]]
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield batches of files with their features; a file that cannot be read is left out, with the reason."""
    for first in range(0, len(files), FILES_PER_BATCH):
        batch, images = [], []
        for file in files[first : first + FILES_PER_BATCH]:
            try:
                images.append(_read(query, file, task.preprocessing, blank))
            except DataError as error:
                left_out.append({"file": path_of(query, file), "reason": str(error)})
            else:
                batch.append(file)
        if batch:
            yield batch, encode_images(task.loaded.model, np.stack(images), task.device)


def _read(root: Path, file: str, preprocessing: Preprocessing, blank: list[str]) -> np.ndarray:
    """One image as the model takes it; its path is added to `blank` if it has one single value."""
    path = path_of(root, file)
    image = apply_preprocessing(read_entry(root, file), path, preprocessing)
    if image.min() == image.max():
        blank.append(path)
    return image


class _MostCertain:
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


def _draw(task: _Task, images: np.ndarray, query: Path, best: _MostCertain, classified: int, figure: Path) -> None:
    from metagmvae.evaluation.figures import plots

    names = task.names[:SHOWN_CLASSES]
    support = [images[task.label_T == k][:SHOWN] for k in range(len(names))]
    chosen = [item for ranked in best.by_class[: len(names)] for item in ranked]
    pixels = [_read(query, file, task.preprocessing, []) for _, file, _ in chosen]
    shown = np.stack(pixels) if pixels else images[:0]
    p_PK = np.array([row[: len(names)] for _, _, row in chosen]).reshape(len(chosen), len(names))
    note = f"{len(chosen):,} of {classified:,} images"
    if len(names) < len(task.names):
        note += f", {len(names)} of {len(task.names)} classes"
    plots.save(plots.predictions(support, names, shown, p_PK, note), figure)
