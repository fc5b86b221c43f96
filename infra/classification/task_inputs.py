"""What `metagmvae classify` reads: labelled examples and queries, as image files or as vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from metagmvae.infra.classification.labelled_files import labelled_files, path_of, query_files
from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.arrays.image_arrays import class_names
from metagmvae.pipelines.arrays.vector_files import SUFFIXES, VectorFile, read_vector_file
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing
from metagmvae.training.models.encode_images import vectors_as_images
from metagmvae.training.models.encoders import EncoderModel

Batch = tuple[list[str], np.ndarray]
"""Names of queries, and the queries as the model takes them."""


class TaskInputs(Protocol):
    """Labelled examples, and queries that are read in batches."""

    @property
    def kind(self) -> Literal["images", "vectors"]:
        """What they are."""

    @property
    def names(self) -> list[str]:
        """Names of the classes."""

    @property
    def label_T(self) -> np.ndarray:
        """Class numbers of the labelled examples."""

    @property
    def queries(self) -> list[str]:
        """Names of all queries."""

    def support(self) -> np.ndarray:
        """The labelled examples as the model takes them."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Queries in their order, at most `size` at a time."""

    @property
    def about(self) -> dict[str, Any]:
        """What was done to them, and what was left out, for the answer."""


@dataclass(frozen=True)
class ImageInputs:
    """Image files.

    Raises:
        DataError: a folder is missing or holds no images; `support`: a labelled image cannot be read; `batches`: no
            query can be read.
    """

    support_root: Path
    query_path: Path
    preprocessing: Preprocessing
    recorded: bool
    """Whether the model records the preprocessing."""
    recursive: bool = False
    labels: Path | None = None
    """Table with the classes of the labelled images; None: their folders."""
    blank: dict[str, None] = field(default_factory=dict)
    """Images of one single value, among those that have been read."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    """`file` and `reason` of queries that cannot be read."""
    kind: Literal["images", "vectors"] = "images"

    def __post_init__(self) -> None:
        """List the files."""
        _ = self._support_files, self._query_files

    @cached_property
    def _support_files(self) -> tuple[list[str], list[str], np.ndarray, list[dict[str, str]]]:
        return labelled_files(self.support_root, self.labels)

    @cached_property
    def _query_files(self) -> tuple[Path, list[str], list[dict[str, str]]]:
        return query_files(self.query_path, recursive=self.recursive)

    @property
    def names(self) -> list[str]:
        return self._support_files[0]

    @property
    def label_T(self) -> np.ndarray:
        return self._support_files[2]

    @property
    def queries(self) -> list[str]:
        return self._query_files[1]

    def support(self) -> np.ndarray:
        return np.stack([self._read(self.support_root, file) for file in self._support_files[1]])

    def batches(self, size: int) -> Iterator[Batch]:
        files, found = self.queries, 0
        for first in range(0, len(files), size):
            batch, images = [], []
            for file in files[first : first + size]:
                try:
                    images.append(self.query(file))
                except DataError as error:
                    self.unreadable.append({"file": path_of(self._query_files[0], file), "reason": str(error)})
                else:
                    batch.append(file)
            found += len(batch)
            if batch:
                yield batch, np.stack(images)
        if not found:
            reason = self.unreadable[-1]["reason"]
            raise DataError(f"{self._query_files[0]}: none of its {len(files)} images can be read; {reason}")

    def query(self, file: str) -> np.ndarray:
        """One query as the model takes it."""
        return self._read(self._query_files[0], file)

    def _read(self, root: Path, file: str) -> np.ndarray:
        path = path_of(root, file)
        image = apply_preprocessing(read_entry(root, file), path, self.preprocessing)
        if image.min() == image.max():
            self.blank[path] = None
        return image

    @property
    def about(self) -> dict[str, Any]:
        done = self.preprocessing.model_dump(mode="json") | {"recorded": self.recorded}
        left_out = self._support_files[3] + self._query_files[2] + self.unreadable
        return {"preprocessing": done, "left_out": left_out, "blank": list(self.blank)}


@dataclass(frozen=True)
class VectorInputs:
    """Vectors of two files; the labelled ones have classes."""

    model: EncoderModel
    labelled: VectorFile
    unlabelled: VectorFile
    names: list[str]
    label_T: np.ndarray
    kind: Literal["images", "vectors"] = "vectors"

    @classmethod
    def open(cls, model: EncoderModel, support: Path, query: Path) -> VectorInputs:
        """Read the classes, and open the vectors.

        Raises:
            DataError: a file cannot be read, or the labelled vectors have no classes or fewer than two.
        """
        for path in (support, query):
            if path.is_dir():
                raise DataError(f"{path}: is a folder, and the model takes vectors; give a {', '.join(SUFFIXES)} file")
        labelled, unlabelled = read_vector_file(support), read_vector_file(query)
        if labelled.labels is None:
            raise DataError(f"{support}: holds no labels; save the class of each vector in it as labels")
        given = class_names(labelled.labels, len(labelled.rows), "vector")
        names, label_T = np.unique(given, return_inverse=True)
        if len(names) < 2:
            raise DataError(f"{support}: holds 1 class; give two or more")
        return cls(model, labelled, unlabelled, names.tolist(), label_T)

    @cached_property
    def queries(self) -> list[str]:
        given = self.unlabelled.names
        return [str(row) for row in (range(len(self.unlabelled.rows)) if given is None else given)]

    def support(self) -> np.ndarray:
        rows = np.arange(len(self.labelled.rows))
        return vectors_as_images(self.model, self.labelled.rows[rows], self.labelled.name)

    def batches(self, size: int) -> Iterator[Batch]:
        names = self.queries
        for first in range(0, len(names), size):
            rows = np.arange(first, min(first + size, len(names)))
            yield (
                names[first : first + size],
                vectors_as_images(self.model, self.unlabelled.rows[rows], self.unlabelled.name),
            )

    @property
    def about(self) -> dict[str, Any]:
        unused = sorted({*self.labelled.unused, *self.unlabelled.unused})
        if self.unlabelled.labels is not None:
            unused.append(f"labels in {self.unlabelled.name}")
        return {"left_out": [], **({"unused": unused} if unused else {})}
