"""Decodes all images of a folder or archive once, to find those that are broken, blank or deeper than 8 bits."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError, MapTasks, first_few
from metagmvae.pipelines.sources.image_decoding import WHITES, decoding_options, measure_image
from metagmvae.pipelines.sources.image_files import EXAMPLES

IMAGES_PER_TASK = 512
"""Images that one task decodes."""
MOSTLY_KEPT = 0.9
"""If the square has a smaller fraction of the area of the median image, the report says so."""


@dataclass
class ScanResult:
    """What decoding some images has shown."""

    preprocessing: Preprocessing
    """Of all images, with `sixteen_bit_white` by their values."""
    broken: dict[str, str] = field(default_factory=dict)
    """Reason by name of the images that cannot be decoded."""
    blank: list[str] = field(default_factory=list)
    """Images of a single value after the preprocessing."""
    highest: dict[str, int] = field(default_factory=dict)
    """Highest value by name of the images with more than 8 bits."""
    losses: dict[str, list[str]] = field(default_factory=dict)
    """Names of the images of which something is lost (`MeasuredImage.losses`), by what it is."""
    square: list[float] = field(default_factory=list)
    """Fraction of the area of each image that its largest square has."""

    @property
    def report(self) -> dict[str, Any]:
        """Part of the output of `metagmvae prepare`."""
        report: dict[str, Any] = {"single_value_images": len(self.blank)}
        if self.blank:
            report["single_value_names"] = first_few(self.blank, shown=EXAMPLES)
        if self.highest:
            white = self.preprocessing.sixteen_bit_white
            values = f"values up to {max(self.highest.values())}, of which {white} becomes 255"
            report["images_above_8_bits"] = f"{len(self.highest)}, {values}"
        if self.losses:
            report["not_used"] = [
                f"{len(names):,} image{'s' * (len(names) > 1)} ({first_few(names, shown=EXAMPLES)}): {what}"
                for what, names in self.losses.items()
            ]
        kept = statistics.median(self.square)
        if self.preprocessing.crop != "none" and kept < MOSTLY_KEPT:
            report["crop"] = (
                f"the middle square of each image is used, {kept:.0%} of the area of the median image; --no-crop "
                "resizes whole images to squares"
            )
        return report


def scan_images(
    root: str,
    names: Sequence[str],
    preprocessing: Preprocessing,
    max_broken: float,
    map_tasks: MapTasks | None,
) -> ScanResult:
    """Decode images, in parallel if `map_tasks` is given.

    Grey values of more than 8 bits have no fixed range: cameras store 12 bits in 16, and other programs 8 bits in 32.
    The highest value of all these images decides which of 8, 10, 12, 14 or 16 bits they have.

    Raises:
        DataError: more than the fraction `max_broken` of the images, or all of them, are broken.
    """
    result = _scan(root, names, preprocessing, map_tasks)
    if len(result.broken) == len(names) or len(result.broken) > max_broken * len(names):
        raise DataError(
            f"{root}: {len(result.broken)} of {len(names)} images cannot be decoded, more than max_broken = "
            f"{max_broken}: {first_few(list(result.broken.values()), '; ')}"
        )
    white = next((white for white in WHITES if result.highest and max(result.highest.values()) <= white), WHITES[-1])
    if white != preprocessing.sixteen_bit_white:
        result.preprocessing = preprocessing.model_copy(update={"sixteen_bit_white": white})
        deep = _scan(root, sorted(result.highest), result.preprocessing, map_tasks)
        result.blank = sorted({*result.blank}.difference(result.highest).union(deep.blank))
    return result


def _scan(root: str, names: Sequence[str], preprocessing: Preprocessing, map_tasks: MapTasks | None) -> ScanResult:
    tasks = [
        (root, names[first : first + IMAGES_PER_TASK], preprocessing) for first in range(0, len(names), IMAGES_PER_TASK)
    ]
    result = ScanResult(preprocessing)
    for part in cast("list[ScanResult]", (map_tasks or itertools.starmap)(scan_some, tasks)):
        result.broken |= part.broken
        result.blank += part.blank
        result.highest |= part.highest
        result.square += part.square
        for what, lost in part.losses.items():
            result.losses.setdefault(what, []).extend(lost)
    return result


def scan_some(root: str, names: Sequence[str], preprocessing: Preprocessing) -> ScanResult:
    """Decode some images. This is one task for a worker."""
    result = ScanResult(preprocessing)
    for name in names:
        try:
            data = read_entry(root, name)
            image = measure_image(data, f"{root}: {name}", **decoding_options(preprocessing))
        except DataError as error:
            result.broken[name] = str(error)
            continue
        for what in image.losses:
            result.losses.setdefault(what, []).append(name)
        result.square.append(min(image.size) / max(image.size))
        if image.pixels.min() == image.pixels.max():
            result.blank.append(name)
        if image.highest is not None:
            result.highest[name] = image.highest
    return result
