"""Raw images by name: `open_source("omniglot", "downloads/omniglot", split="vinyals")`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.pipelines.archives.reader import Entry
from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks

OPENERS = {
    "folder": "metagmvae.pipelines.sources.image_folder:open_folder",
    "glyphs": "metagmvae.pipelines.sources.glyphs:open_glyphs",
    "mini-imagenet": "metagmvae.pipelines.sources.mini_imagenet:open_mini_imagenet",
    "omniglot": "metagmvae.pipelines.sources.omniglot:open_omniglot",
}
"""Name -> module and function, imported when asked for."""


@dataclass(frozen=True)
class Source:
    """Images by split, in a stable order. Picklable: it travels to the workers that decode."""

    name: str
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    splits: dict[str, list[ImageRecord]]
    fingerprint: str
    """sha256 over the identity of the content and the options: the same where the images are the same."""
    report: dict[str, Any] = field(default_factory=dict)
    """What was found, what is missing and what was left out."""

    permuted = False
    dtype = "uint8"

    @property
    def row_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "images", "image_shape": list(self.image_shape)}

    @property
    def attachments(self) -> dict[str, Path]:
        return {}

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Decode rows of a split: uint8 (n, C, H, W).

        Raises:
            DataError: an image cannot be decoded.
        """
        block = np.empty((len(rows), *self.image_shape), np.uint8)
        records = self.splits[split]
        for position, row in enumerate(rows):
            block[position] = records[row].load()
        return block


def open_source(name: str, source: str | None = None, *, map_tasks: MapTasks | None = None, **options: Any) -> Source:
    """Open a source of images.

    Args:
        name: one of `OPENERS`.
        source: folder or archive that holds it, for the sources that need one.
        map_tasks: does what there is to be done image by image (Ray tasks, say); in this process when None.
        options: of that source; see its module.

    Raises:
        DataError: unknown name or option, or what the source refuses.
    """
    if name not in OPENERS:
        raise DataError(f"unknown source {name!r}; known: {', '.join(OPENERS)}")
    module, function = OPENERS[name].split(":")
    opener: Callable[..., Source] = getattr(import_module(module), function)
    parameters = inspect.signature(opener).parameters
    known = [option for option in parameters if option not in ("source", "map_tasks")]
    for option in options:
        if option not in known:
            raise DataError(f"source {name!r} has no option {option!r}; it has: {', '.join(known)}")
    return opener(source, **options, **({"map_tasks": map_tasks} if "map_tasks" in parameters else {}))


def check_integer(option: str, value: Any, least: int) -> None:
    """Refuse an option that is not a whole number of at least `least`.

    Raises:
        DataError: naming the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{option} is {value!r}; give a whole number, {least} or more")


def source_fingerprint(name: str, entries: Iterable[tuple[str, Entry]], options: dict[str, Any]) -> str:
    """sha256 over the name, the files (part, name, CRC-32, size) and the options of a source."""
    files = [[part, entry.name, entry.crc, entry.size] for part, entry in entries]
    return sha256_json({"source": name, "files": files, "options": options})
