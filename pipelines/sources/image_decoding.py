"""Image file bytes -> uint8 pixels of one size, with guards for what folders of images really hold."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from metagmvae.pipelines.records import DataError

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB"}
SIXTEEN_BIT = 65_535
ORIENTATION = 0x0112
"""EXIF tag."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)
"""What Pillow's decoders raise on damaged bytes, found by feeding them such."""


def decode_image(data: bytes, name: str, *, size: int, channels: int, invert: bool = False) -> np.ndarray:
    """Decode, turn upright, cut to a centred square, resize (Lanczos).

    Transparent pixels are laid on white, 16-bit grey is scaled to 8 bits, the orientation in EXIF is applied,
    and of an animation or a file of several pages the first frame is taken.

    Args:
        data: the bytes of the file.
        name: of the file, for messages.
        size: side of the result in pixels.
        channels: 1 (grey) or 3 (RGB).
        invert: 255 - value, for dark strokes on a bright background.

    Returns:
        uint8, (channels, size, size).

    Raises:
        DataError: not an image, damaged, cut short, without pixels, too large, or of floating-point values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                _check_area(image, name)
                if image.format == "JPEG":
                    # Decoded at 1/2, 1/4 or 1/8 where that leaves twice the size: several times faster.
                    image.draft(None, (2 * size, 2 * size))
                image.load()
                upright = _upright(image)
                square = ImageOps.fit(_eight_bit(upright, channels, name), (size, size), Image.Resampling.LANCZOS)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {MAX_PIXELS} pixels; make it smaller or leave it out") from error
    except DAMAGE as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image that can be read" if unknown else " ".join(str(error).split())
        raise DataError(f"{name}: broken image ({reason}); replace or remove it") from error
    pixels = np.asarray(square, dtype=np.uint8)
    if invert:
        pixels = 255 - pixels
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def resize_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pixels that are decoded already to a centred square: uint8 (H, W, 3) -> (3, size, size)."""
    square = ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """By the camera's note of how it was held. `ImageOps.exif_transpose` also writes the rest of EXIF anew, and fails
    on pictures whose only damage is there."""
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _check_area(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name}: image of {width} x {height} pixels; replace or remove it")
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS}; make it smaller or leave it out")


def _eight_bit(image: Image.Image, channels: int, name: str) -> Image.Image:
    """Any mode -> "L" or "RGB"."""
    if image.mode == "F":
        raise DataError(f"{name}: floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > SIXTEEN_BIT:
            raise DataError(f"{name}: values outside 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray(np.rint(values / (SIXTEEN_BIT / 255)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return image.convert(MODES[channels])
