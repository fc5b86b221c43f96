"""Opens a source of raw images by name: `open_source("omniglot", "downloads/omniglot", split="vinyals")`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from metagmvae.configs.suggestions import suggestion
from metagmvae.pipelines.archives.reader import Entry
from metagmvae.pipelines.extensions import extension_names, load_extension
from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, ImageRecord, MapTasks

OPENERS = {
    "folder": "metagmvae.pipelines.sources.image_folder:open_folder",
    "glyphs": "metagmvae.pipelines.sources.glyphs:open_glyphs",
    "mini-imagenet": "metagmvae.pipelines.sources.mini_imagenet:open_mini_imagenet",
    "npz": "metagmvae.pipelines.arrays.numpy_images:open_npz",
    "omniglot": "metagmvae.pipelines.sources.omniglot:open_omniglot",
    "parquet": "metagmvae.pipelines.arrays.image_tables:open_parquet",
    "webdataset": "metagmvae.pipelines.arrays.tar_images:open_webdataset",
    "vectors": "metagmvae.pipelines.arrays.vectors:open_vector_files",
}
"""Module and function by name of the source; the module is imported when the source is opened."""

MAX_SIDE = 4096
"""Largest side of the images of a dataset in pixels."""


@dataclass(frozen=True)
class ImageSource:
    """Images by split, in a fixed order. It is sent to the workers that decode images, so it must be picklable."""

    name: str
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    splits: dict[str, list[ImageRecord]]
    fingerprint: str
    """sha256 of content and options: equal for equal images."""
    report: dict[str, Any] = field(default_factory=dict)
    """Numbers of images and classes, and what is missing or skipped, for the output of `metagmvae prepare`."""

    preprocessing: Preprocessing | None = None
    """What `load` of each record does to an image, recorded in the manifest; None if `Preprocessing` cannot say it."""

    files: dict[str, Any] = field(default_factory=dict)
    """Account of the files of the source (`files_report`), printed by `metagmvae prepare`."""

    permuted = False
    dtype = "uint8"

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_shape

    @property
    def about(self) -> dict[str, Any]:
        """Further keys of the manifest."""
        recorded = {"preprocessing": self.preprocessing.model_dump(mode="json")} if self.preprocessing else {}
        if "options" in self.report:  # they name the split of Omniglot
            recorded["options"] = self.report["options"]
        return {"kind": "images", "image_shape": list(self.image_shape), **recorded}

    @property
    def attachments(self) -> dict[str, Path]:
        """No additional files."""
        return {}

    def load_block(self, split: str, rows: Sequence[int]) -> np.ndarray:
        """Decode images of a split: uint8, (n, C, H, W).

        Raises:
            DataError: an image cannot be decoded.
        """
        block = np.empty((len(rows), *self.image_shape), np.uint8)
        records = self.splits[split]
        for position, row in enumerate(rows):
            block[position] = records[row].load()
        return block


def open_source(
    name: str, source: str | None = None, *, map_tasks: MapTasks | None = None, **options: Any
) -> ImageSource:
    """Open a source of images.

    Args:
        name: one of `OPENERS`, or a source that another package adds (`metagmvae.sources`).
        source: folder or archive with the raw data, for sources that need one.
        map_tasks: decodes images in parallel, for example as Ray tasks; None decodes them in this process.
        options: options of the source, see its module.

    Raises:
        DataError: the name or an option is unknown, or the source refuses the data.
    """
    opener = _opener(name)
    parameters = inspect.signature(opener).parameters
    known = [option for option in parameters if option not in ("source", "map_tasks")]
    for option in options:
        if option not in known:
            raise DataError(f"source {name!r} has no option {option!r}; choose from {', '.join(known)}")
    opened = opener(source, **options, **({"map_tasks": map_tasks} if "map_tasks" in parameters else {}))
    if not isinstance(opened, ImageSource):
        raise DataError(f"source {name!r} returns {type(opened).__name__}, not an ImageSource; update its package")
    return opened


def _opener(name: str) -> Callable[..., ImageSource]:
    """The function that opens a source: of this package, else of another one that adds the name."""
    if name in OPENERS:
        module, function = OPENERS[name].split(":")
        opener: Callable[..., ImageSource] = getattr(import_module(module), function)
        return opener
    added = load_extension("metagmvae.sources", name)
    if added is None:
        if Path(name).exists():
            raise DataError(f"{name!r} is a path, not a kind of source; for a folder of images: folder --source {name}")
        known = [*OPENERS, *extension_names("metagmvae.sources")]
        raise DataError(f"unknown source {name!r}{suggestion(name, known)}")
    return added


def check_integer(option: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse an option that is not an integer of at least `least` and at most `most`.

    Raises:
        DataError: with the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{option} is {value!r}; give an integer of at least {least}")
    if most is not None and value > most:
        raise DataError(f"{option} is {value!r}; give an integer of at most {most}")


def source_fingerprint(name: str, entries: Iterable[tuple[str, Entry]], options: dict[str, Any]) -> str:
    """sha256 of the name, the files (part, name, CRC-32, size) and the options of a source."""
    files = [[part, entry.name, entry.crc, entry.size] for part, entry in entries]
    return sha256_json({"source": name, "files": files, "options": options})
