"""Datasets of generated glyphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


def new_dataset(folder: Path, classes: tuple[int, int, int], drawings: int = 20, **options: Any) -> Path:
    """Write a dataset; `classes` of training, validation and test, each of so many `drawings`."""
    write_dataset(open_source("glyphs", classes=classes, drawings=drawings), folder, **options)
    return folder
