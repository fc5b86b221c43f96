"""Decodes image files to uint8 pixels of one size, and refuses damaged and oversized files."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused before decoding."""
FORMATS = ("JPEG", "JPEG2000", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF")
"""Formats of Pillow that are decoded. Others are never tried: its EPS decoder starts Ghostscript on any file."""
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    *(".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)
"""Suffixes of image files. A file without a suffix is read if its content is an image (`is_image`)."""
MODES = {1: "L", 3: "RGB"}
SIXTEEN_BIT = 65_535
WHITES = (255, 1_023, 4_095, 16_383, SIXTEEN_BIT)
"""Largest values of 8, 10, 12, 14 and 16 bits."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BANDS, EXTRA_BANDS = 277, 338
"""TIFF tags: the number of bands, and the meaning of those after grey or RGB (1 and 2: alpha)."""
FIRST_BANDS = "only the first 1 or 3 bands are used"
SIXTEEN_BIT_COLOUR = "colours of 16 bits: 65,535 becomes 255; scale files with a smaller range, such as reflectances"
"""What may be lost of an image in silence."""
logging.getLogger(TiffImagePlugin.__name__).setLevel(logging.CRITICAL)  # it repeats what the exceptions say
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)
"""Exceptions of the decoders of Pillow on damaged files, found by tests with such files."""


def apply_preprocessing(image: bytes | np.ndarray | Image.Image, name: str, preprocessing: Preprocessing) -> np.ndarray:
    """Apply the recorded preprocessing of a dataset to one image, exactly as `metagmvae prepare` does.

    Args:
        image: content of an image file, uint8 pixels, (1, H, W) or (3, H, W), or an image of Pillow.
        name: name of the image for error messages.
        preprocessing: `Dataset.preprocessing`.

    Returns:
        uint8, `preprocessing.image_shape`.

    Raises:
        DataError: the file cannot be decoded (see `decode_image`), or the array has another type or shape.
    """
    options = decoding_options(preprocessing)
    if isinstance(image, bytes):
        return decode_image(image, name, **options)
    size, channels, invert, white, crop = (options[key] for key in ("size", "channels", "invert", "white", "crop"))
    if isinstance(image, Image.Image):
        _check_area(image, name)
        with _damage(name):
            opaque = _eight_bit(_upright(_without_empty_alpha(image)), channels, name, white)
            return _to_square(opaque, size, invert, crop)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in MODES or 0 in image.shape:
        raise DataError(f"{name}: pixels are {image.dtype} {image.shape}; give uint8 (1, H, W) or (3, H, W)")
    opened = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    return _to_square(opened.convert(MODES[channels]), size, invert, crop)


def decoding_options(preprocessing: Preprocessing) -> dict[str, Any]:
    """Options of `decode_image` that apply a recorded preprocessing."""
    return {
        "size": preprocessing.size[0],
        "channels": preprocessing.channels,
        "invert": preprocessing.invert,
        "white": preprocessing.sixteen_bit_white,
        "crop": preprocessing.crop != "none",
    }


def decode_image(
    data: bytes,
    name: str,
    *,
    size: int,
    channels: int,
    invert: bool = False,
    white: int = SIXTEEN_BIT,
    crop: bool = True,
) -> np.ndarray:
    """Decode an image, crop it to a centred square and resize it (Lanczos).

    Transparent pixels become white, grey values of more than 8 bits are scaled to 8 bits, and the EXIF orientation is
    applied. Of an animation or a file with several pages the first frame is used.

    Args:
        data: content of the file.
        name: name of the file for error messages.
        size: side of the result in pixels.
        channels: 1 (grey) or 3 (RGB).
        invert: replace each value by 255 - value, for dark strokes on a bright background.
        white: the grey value of an image with more than 8 bits that becomes 255.
        crop: False resizes the whole image to the square.

    Returns:
        uint8, (channels, size, size).

    Raises:
        DataError: the file is not an image, damaged, truncated, empty, too large, or has floating-point values.
    """
    return measure_image(data, name, size=size, channels=channels, invert=invert, white=white, crop=crop).pixels


@dataclass(frozen=True)
class MeasuredImage:
    """An image that was decoded once."""

    pixels: np.ndarray
    """As `decode_image` returns them."""
    size: tuple[int, int]
    """Width and height in the file."""
    highest: int | None
    """Highest value of an image with more than 8 bits of grey; None for other images."""
    losses: tuple[str, ...] = ()
    """`FIRST_BANDS` and `SIXTEEN_BIT_COLOUR`, if they apply to the file."""


def measure_image(
    data: bytes, name: str, *, size: int, channels: int, invert: bool, white: int, crop: bool
) -> MeasuredImage:
    """Decode an image, and tell what is in its file; arguments and errors are those of `decode_image`."""
    with _damage(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data, name) as image:
            _check_area(image, name)
            in_file, losses = image.size, _losses(image)
            if image.format == "JPEG":
                # Decode at 1/2, 1/4 or 1/8 of the size if at least twice the result remains: several times faster.
                image.draft(None, (2 * size, 2 * size))
            image.load()
            highest = int(np.asarray(image).max()) if image.mode.startswith("I") else None
            opaque = _without_empty_alpha(image)
            pixels = _to_square(_eight_bit(_upright(opaque), channels, name, white), size, invert, crop)
            return MeasuredImage(pixels, in_file, highest, losses)


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header of an image.

    Raises:
        DataError: it has more bands than Pillow reads.
    """
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError as error:
        if bands := _tiff_bands(data):
            choice = "save 1 or 3 of them with 8 bits, or use vectors of a network that takes all (prepare vectors)"
            raise DataError(f"{name}: a TIFF image of {bands} bands in a form that is not read; {choice}") from error
        raise


def _tiff_bands(data: bytes) -> int:
    """Number of bands that a TIFF file states, if there are several; 0 for other files."""
    if not data.startswith(tuple(TiffImagePlugin.PREFIXES)):
        return 0
    try:
        header = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
        file = io.BytesIO(data)
        file.seek(header.next)
        header.load(file)
        bands = int(header.get(BANDS, 1))
    except DAMAGE:
        return 0
    return bands if bands > 1 else 0


def _losses(image: Image.Image) -> tuple[str, ...]:
    """What decoding an image leaves out of its file, which has been opened and not decoded."""
    losses = []
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        extra = image.tag_v2.get(EXTRA_BANDS, ())
        if any(meaning not in (1, 2) for meaning in (extra if isinstance(extra, tuple) else (extra,))):
            losses.append(FIRST_BANDS)
    tiles = getattr(image, "tile", [])
    raw = str(tiles[0][3]) if tiles else ""
    if image.mode in ("RGB", "RGBA") and ";16" in raw:
        losses.append(SIXTEEN_BIT_COLOUR)
    return tuple(losses)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Convert what Pillow raises for a damaged image to a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {MAX_PIXELS} pixels; resize or remove it") from error
    except DAMAGE as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "unknown image format" if unknown else " ".join(str(error).split())
        raise DataError(f"{name}: broken image ({reason}); replace or remove it") from error


def is_image(file: IO[bytes]) -> bool:
    """Whether the content of an opened file begins like an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_formats()):
                return True
    except Image.DecompressionBombError:
        return True
    except DAMAGE:
        return False


def image_header(data: bytes, name: str) -> tuple[tuple[int, int], bool]:
    """Width and height of an image in its file, and whether it may have colour; it is not decoded.

    Raises:
        DataError: the file is not an image.
    """
    with _damage(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data, name) as image:
            return image.size, image.mode not in ("1", "L", "LA") and not image.mode.startswith(("I", "F"))


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that this installation of Pillow supports; `Image.open` fails on the others."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _without_empty_alpha(image: Image.Image) -> Image.Image:
    """Ignore an alpha channel of a BMP file that is 0 everywhere: many programs leave the fourth byte unset."""
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    return image


def _to_square(image: Image.Image, size: int, invert: bool, crop: bool) -> np.ndarray:
    """Crop an "L" or "RGB" image to a centred square, if asked for, and resize it: uint8, (1 or 3, size, size)."""
    resize = partial(ImageOps.fit, image) if crop else image.resize
    pixels = np.asarray(resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)
    if invert:
        pixels = 255 - pixels
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. `ImageOps.exif_transpose` also rewrites the other EXIF tags, and therefore fails on
    images in which only those are damaged."""
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _check_area(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name}: image has {width} x {height} pixels; replace or remove it")
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS}; resize or remove it")


def _eight_bit(image: Image.Image, channels: int, name: str, white: int) -> Image.Image:
    """Convert an image of any mode to "L" or "RGB"."""
    if image.mode == "F":
        raise DataError(f"{name}: floating-point pixels have no fixed range; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > SIXTEEN_BIT:
            raise DataError(f"{name}: values exceed 16 bits; save the image with 8 or 16 bits")
        if values.max() > white:
            raise DataError(f"{name}: values up to {values.max()}, but the dataset has at most {white}; convert it")
        image = Image.fromarray(np.rint(values / (white / 255)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image).convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return image.convert(MODES[channels])
