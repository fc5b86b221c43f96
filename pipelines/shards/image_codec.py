"""Encodes and decodes the images of `metagmvae prepare --store encoded`: JPEG, and WebP without loss.

Of the lossless formats that plain `webdataset` decodes, WebP takes two thirds of the space of PNG and less time. Pillow
decodes without holding Python's global lock, so threads suffice: 10,000 JPEG files of 84 x 84 a second on each core.
torchvision's decoder needs less than half of that time, but is deprecated since torchvision 0.29.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.manifest import LOSSLESS, Quality
from metagmvae.pipelines.sources.image_decoding import DAMAGE, MODES

JPEG, WEBP, LOSSY_JPEG = ".jpg", ".webp", ".lossy.jpg"
"""Suffixes of the members: a JPEG file as it was read; encoded without loss, or a WebP file as it was read; encoded
again with loss."""
SUFFIXES = (JPEG, WEBP, LOSSY_JPEG)
FORMATS = ("JPEG", "WEBP")
"""Names of Pillow."""
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
LEAST_IMAGE_BYTES = 4096
"""Smaller images need no less space encoded: a member of a tar file takes at least 1,024 bytes."""


def worth_encoding(image_shape: tuple[int, ...]) -> bool:
    """Whether images of this shape, (C, H, W), take less space encoded."""
    return math.prod(image_shape) >= LEAST_IMAGE_BYTES


def encode_member(pixels: np.ndarray, original: bytes | None, quality: Quality) -> tuple[str, bytes]:
    """Encode one image; return the suffix of the member and its content.

    A JPEG or WebP file stays as it was read if decoding it gives exactly these pixels and it is smaller than they are.

    Args:
        pixels: the prepared image, uint8 (C, H, W).
        original: content of its file; None if there is none.
        quality: of images that are encoded again.
    """
    if original is not None and len(original) < pixels.nbytes and _decodes_to(original, pixels):
        return (JPEG if original.startswith(b"\xff\xd8") else WEBP), original
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    content = io.BytesIO()
    if quality != LOSSLESS:
        image.save(content, "JPEG", quality=quality, optimize=True)
        return LOSSY_JPEG, content.getvalue()
    image.save(content, "WEBP", lossless=True, method=1, quality=0)  # 5 times faster than method 4, 2% larger
    return WEBP, content.getvalue()


def _decodes_to(content: bytes, pixels: np.ndarray) -> bool:
    try:
        return np.array_equal(decode_member(content, pixels.shape), pixels)
    except ValueError:
        return False


def decode_member(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decode one image: uint8 (C, H, W).

    Args:
        content: a JPEG or WebP file.
        shape: (C, H, W) that it must have. It is compared with the header before anything is decoded.

    Raises:
        ValueError: it is damaged or truncated, or has another size or format. The message is short.
    """
    channels, height, width = shape
    mode = MODES[channels]
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.size != (width, height):
                raise DataError(f"the image is {image.width} x {image.height}, not {width} x {height}")
            # Grey images have three equal channels in WebP, from which `convert` restores the grey values exactly.
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError("neither a JPEG nor a WebP file") from error
    except BOMB as error:
        raise ValueError(f"the image has far more pixels than {width} x {height}") from error
    except DAMAGE as error:
        raise ValueError(f"broken image ({' '.join(str(error).split())[:100]})") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
