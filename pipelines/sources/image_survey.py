"""Looks at the images of a folder or archive: number, sizes, colour, and whether they are drawings or photographs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.image_decoding import decode_image, image_header

SAMPLE = 400
"""Images that sizes and strokes are measured on."""
SIDE = 64
"""Side to which images are resized to look at their pixels."""
SIZES = (28, 84)
"""Smallest and largest default size of an image: those of Omniglot and Mini-ImageNet in the few-shot literature."""
COLOUR = 16
"""Largest difference between the channels of a pixel that counts as grey; JPEG makes small ones."""
PAPER_TOLERANCE, INK_DISTANCE = 24, 64
"""Values this near to the background are background, values this far from it are ink."""
PAPER_FRACTION = 0.6
"""A drawing is background in at least this fraction of its pixels."""
BLOB = 15
"""Ink that is wider than this in both directions is no stroke, at `SIDE` pixels."""
BLOB_FRACTION = 0.1
"""Largest fraction of the ink of a drawing that is no stroke."""
STROKES_FRACTION = 0.8
"""Images are drawings if this fraction of them is."""


@dataclass(frozen=True)
class ImageSurvey:
    """What a look at the images has shown. Fractions are of the images of the sample that can be decoded."""

    images: int
    """Number of images."""
    sample: int
    """Number of images whose sizes and strokes were measured."""
    sides: tuple[int, int, int]
    """Smallest, median and largest shorter side of the sample, in pixels."""
    channels: int
    """3 if at least one image has colour, 1 if all are grey."""
    drawn: float
    """Fraction of the images that are drawings: thin strokes on an even background."""
    dark_on_bright: float
    """Fraction of the drawings whose background is bright."""

    @property
    def strokes(self) -> bool:
        """Whether the images are drawings rather than photographs."""
        return self.drawn >= STROKES_FRACTION

    @property
    def inverted(self) -> bool:
        """Whether the images are drawings with dark strokes on a bright background."""
        return self.strokes and self.dark_on_bright > 0.5

    @property
    def size(self) -> int:
        """The default size of a dataset: 28 for drawings, else the median shorter side, from 28 to 84."""
        return SIZES[0] if self.strokes else min(max(self.sides[1], SIZES[0]), SIZES[1])


def survey_images(root: str, names: Sequence[str]) -> ImageSurvey:
    """Look at a seeded sample of the images, and at as many as are needed to find one with colour.

    Broken images are left to `scan_images`, which names them.

    Args:
        root: folder or archive.
        names: its image files.

    Raises:
        DataError: no image of the sample can be decoded.
    """
    order = [names[row] for row in keyed_rng("survey", 0).permutation(len(names))]
    sides, drawings = [], []
    reason = ""
    for name in order[:SAMPLE]:
        try:
            data = read_entry(root, name)
            pixels = decode_image(data, f"{root}: {name}", size=SIDE, channels=1)[0]
            sides.append(min(image_header(data, name)[0]))
        except DataError as error:
            reason = str(error)
            continue
        drawings.append(_background_of_drawing(pixels))
    if not sides:
        raise DataError(f"{root}: {len(order[:SAMPLE])} of {len(names)} images cannot be decoded: {reason}")
    backgrounds = [background for background in drawings if background is not None]
    bright = sum(background > 127 for background in backgrounds)
    return ImageSurvey(
        images=len(names),
        sample=len(sides),
        sides=(min(sides), statistics.median_low(sides), max(sides)),
        channels=3 if any(_has_colour(root, name) for name in order) else 1,
        drawn=len(backgrounds) / len(drawings),
        dark_on_bright=bright / len(backgrounds) if backgrounds else 0.0,
    )


def _has_colour(root: str, name: str) -> bool:
    try:
        data = read_entry(root, name)
        if not image_header(data, name)[1]:
            return False
        pixels = decode_image(data, f"{root}: {name}", size=SIDE, channels=3).astype(np.int16)
    except DataError:
        return False
    return bool((pixels.max(axis=0) - pixels.min(axis=0)).max() > COLOUR)


def _background_of_drawing(pixels: np.ndarray) -> int | None:
    """The background value of a drawing, (SIDE, SIDE) -> 0 to 255; None for a photograph and an empty image."""
    # The middle of the most common of 16 ranges of values.
    background = int(np.bincount(pixels.ravel() // 16, minlength=16).argmax()) * 16 + 8
    distance = np.abs(pixels.astype(np.int16) - background)
    ink = distance > INK_DISTANCE
    if not ink.any() or (distance <= PAPER_TOLERANCE).mean() < PAPER_FRACTION:
        return None
    # A minimum over a window keeps only ink that is wider than the window; the maximum restores its size.
    eroded = Image.fromarray(ink.astype(np.uint8)).filter(ImageFilter.MinFilter(BLOB))
    blobs = np.asarray(eroded.filter(ImageFilter.MaxFilter(BLOB))).astype(bool) & ink
    return background if blobs.sum() <= BLOB_FRACTION * ink.sum() else None
