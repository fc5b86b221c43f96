"""What the writer of a dataset reads: images (`pipelines.sources`) or features (`feature_source`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from metagmvae.pipelines.records import ImageRecord


class RowSource(Protocol):
    """Source of images or features for the writer. It is sent to workers, so it must be picklable."""

    @property
    def name(self) -> str:
        """Name of the dataset."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row: (C, H, W) or (F,)."""

    @property
    def dtype(self) -> str:
        """NumPy type of the rows."""

    @property
    def about(self) -> dict[str, Any]:
        """Further keys of the manifest, at least `kind` and `image_shape`."""

    @property
    def attachments(self) -> dict[str, Path]:
        """Additional files, by their name in the dataset."""

    @property
    def permuted(self) -> bool:
        """Whether the rows are already in random order, which is then kept."""

    @property
    def splits(self) -> Mapping[str, Sequence[ImageRecord]]:
        """Samples by split."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the rows."""

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Rows of a split, (n, *row_shape)."""
