"""What tests of the commands type: settings as words, and a small data set of glyphs to name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


def set_words(settings: Mapping[str, object]) -> list[str]:
    """Settings as `--set key=value`, word by word."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def small_glyphs(folder: Path) -> Path:
    """Shards of 30, 6 and 6 classes with 20 drawings each, in `folder`."""
    write_dataset(open_source("glyphs", classes=(30, 6, 6), drawings=20), folder)
    return folder
