"""Feature vectors by split, as a source that `metagmvae prepare` writes: a dataset of features without images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metagmvae.pipelines.records import DataError, ImageRecord, Rows
from metagmvae.pipelines.sources.source import ImageSource
from metagmvae.pipelines.vectors import VECTORS, convert, vector_digest


@dataclass(frozen=True, kw_only=True)
class VectorSource(ImageSource):
    """Vectors of several files, each read by row indices."""

    files: dict[str, Any]
    rows: tuple[tuple[str, Rows], ...]
    """Name and rows (n, F) of each file, in any number format; picklable."""
    dtype: str = "float32"
    """Number format in the dataset."""

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(F,)."""
        return self.image_shape[:1]

    @property
    def about(self) -> dict[str, Any]:
        """Further keys of the manifest."""
        size = self.image_shape[0]
        encoder = {"sha256": vector_digest(size), "encoder": VECTORS}
        return {"kind": "features", "image_shape": list(self.image_shape), "feature_size": size, "encoder": encoder}

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Vectors of a split, (n, F).

        Raises:
            DataError: a value is not finite, or too large for the number format.
        """
        records = self.splits[split]
        assert isinstance(records, VectorRecords)
        wanted = records.positions[np.asarray(rows)]
        block = np.empty((len(wanted), *self.row_shape), self.dtype)
        first = 0
        for name, vectors in self.rows:
            inside = np.flatnonzero((wanted >= first) & (wanted < first + len(vectors)))
            # In the order of the file, which a memory map reads faster.
            inside = inside[np.argsort(wanted[inside], kind="stable")]
            if len(inside):
                block[inside] = stored_values(vectors[wanted[inside] - first], self.dtype, name, wanted[inside] - first)
            first += len(vectors)
        return block


class VectorRecords(Sequence[ImageRecord]):
    """The vectors of a split as records, created on access.

    Args:
        positions: (n,): row of each vector among those of all files.
        class_ids: (n,): numbers of `class_names`.
        class_names: all names.
        keys: of the vectors of all files; None: their row.
        groups: of the vectors of all files; None: they have none.
    """

    def __init__(
        self,
        positions: np.ndarray,
        class_ids: np.ndarray,
        class_names: Sequence[str],
        keys: Sequence[str] | None,
        groups: Sequence[str] | None,
    ) -> None:
        self.positions = positions
        self.class_ids = class_ids
        self.class_names = class_names
        self.keys = keys
        self.groups = groups

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        row = int(self.positions[index])
        key = f"{row:08d}" if self.keys is None else self.keys[row]
        group = "" if self.groups is None else self.groups[row]
        return ImageRecord(key, self.class_names[self.class_ids[index]], _no_image, group=group)


def _no_image() -> np.ndarray:
    raise NotImplementedError("vectors are read by VectorSource.load_block")


def stored_values(values: np.ndarray, dtype: str, name: str, rows: np.ndarray) -> np.ndarray:
    """Vectors in the number format of a dataset, (n, F).

    Args:
        values: (n, F), numbers of any format.
        dtype: float16 or float32.
        name: of their file, for the message.
        rows: (n,): their rows in it, for the message.

    Raises:
        DataError: a value is not finite, or too large for the number format.
    """
    values = np.asarray(values)
    stored, wrong = convert(values, dtype)
    if wrong is None:
        return stored
    row, column = wrong
    value, place = values[row, column], f"{name}: value {column} of row {rows[row]}"
    if np.isfinite(value):
        raise DataError(f"{place} is {value:g}, too large for {dtype}; give --dtype float32, or scale the vectors")
    raise DataError(f"{place} is {value}; every value must be finite: compute this vector again, or remove it")
