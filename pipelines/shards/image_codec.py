"""Encodes and decodes the images of `metagmvae prepare --store encoded`: JPEG, and WebP without loss.

Of the lossless formats that `webdataset` and torchvision decode, WebP is a third smaller than PNG and decoded faster
(84 x 84 photographs: 8.6 instead of 13.4 KB). torchvision decodes without holding Python's global lock, so threads
suffice, and needs less than half of Pillow's time.
"""

from __future__ import annotations

import io
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from metagmvae.pipelines.files import first_line
from metagmvae.pipelines.records import DataError

Store = Literal["decoded", "encoded"]
LOSSLESS: Literal["lossless"] = "lossless"
Quality = Literal["lossless"] | Annotated[int, Field(ge=1, le=100)]
"""How images are encoded again: without loss, or the quality of JPEG."""
JPEG, WEBP, LOSSY_JPEG = ".jpg", ".webp", ".lossy.jpg"
"""Suffixes of the members: a JPEG file as it was read; encoded without loss, or a WebP file as it was read; encoded
again with loss."""
SUFFIXES = (JPEG, WEBP, LOSSY_JPEG)
LEAST_IMAGE_BYTES = 4096
"""Smaller images need no less space encoded: a member of a tar file takes at least 1,024 bytes."""
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header, which states the size of the image."""
RIFF_HEADER = 12


def encode_member(pixels: np.ndarray, original: bytes | None, quality: Quality) -> tuple[str, bytes]:
    """Encode one image; return the suffix of the member and its content.

    A JPEG or WebP file stays as it was read if decoding it gives exactly these pixels and it is smaller than they are.

    Args:
        pixels: the prepared image, uint8 (C, H, W).
        original: content of its file; None if there is none.
        quality: of images that are encoded again.

    Raises:
        DataError: this installation cannot decode what it encodes.
    """
    from PIL import Image  # here, because reading a dataset does not need it

    if original is not None and len(original) < pixels.nbytes and _decodes_to(original, pixels):
        return (JPEG if original.startswith(b"\xff\xd8") else WEBP), original
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    content = io.BytesIO()
    if quality != LOSSLESS:
        image.save(content, "JPEG", quality=quality, optimize=True)
        return LOSSY_JPEG, content.getvalue()
    image.save(content, "WEBP", lossless=True, method=1, quality=0)  # 6 times faster than method 4, 1.5% larger
    if not _decodes_to(content.getvalue(), pixels):
        raise DataError("torchvision does not decode lossless WebP here; install its wheel, or use --store decoded")
    return WEBP, content.getvalue()


def _decodes_to(content: bytes, pixels: np.ndarray) -> bool:
    try:
        return np.array_equal(decode_member(bytearray(content), pixels.shape), pixels)
    except ValueError:
        return False


def decode_member(content: bytearray, shape: tuple[int, ...]) -> np.ndarray:
    """Decode one image: uint8 (C, H, W).

    Args:
        content: a JPEG or WebP file.
        shape: (C, H, W) that it must have. It is compared with the header before anything is allocated.

    Raises:
        ValueError: it is damaged or truncated, or has another size or format. The message is short.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_image

    channels, height, width = shape
    if len(content) > 2 * channels * height * width + LEAST_IMAGE_BYTES:
        raise ValueError(f"{len(content):,} bytes are too many for an image of {width} x {height}")
    stated = _stated_size(content)
    if stated != (width, height):
        raise ValueError(f"the image is {stated[0]} x {stated[1]}, not {width} x {height}")
    grey_jpeg = channels == 1 and content.startswith(b"\xff\xd8")  # WebP has no grey images: three equal channels
    try:
        image = decode_image(
            torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.GRAY if grey_jpeg else ImageReadMode.RGB
        )
    except RuntimeError as error:
        raise ValueError(f"broken image ({_reason(error)})") from error
    return image[:channels].numpy()


def _stated_size(content: bytearray) -> tuple[int, int]:
    """Width and height in the header of a JPEG file, or of a WebP file of one image without transparency.

    Raises:
        ValueError: it is another file, or its header is damaged.
    """
    if content.startswith(b"\xff\xd8"):
        return _jpeg_size(content)
    chunk = content[RIFF_HEADER : RIFF_HEADER + 18]  # 4 bytes name, 4 bytes size, then the header of the image
    if content[:4] == b"RIFF" and content[8:RIFF_HEADER] == b"WEBP" and len(chunk) == 18:
        if chunk[:4] == b"VP8L" and chunk[8] == 0x2F:
            bits = int.from_bytes(chunk[9:13], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk[:4] == b"VP8 " and chunk[11:14] == b"\x9d\x01\x2a":
            return tuple(int.from_bytes(chunk[start : start + 2], "little") & 0x3FFF for start in (14, 16))  # type: ignore[return-value]
    raise ValueError("neither a JPEG file nor a WebP file of one image")


def _jpeg_size(content: bytearray) -> tuple[int, int]:
    position = 2
    while position + 9 <= len(content) and content[position] == 0xFF:
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        if content[position + 1] in FRAMES:
            height, width = (int.from_bytes(content[position + at : position + at + 2], "big") for at in (5, 7))
            return width, height
        if length < 2:
            break
        position += 2 + length
    raise ValueError("damaged JPEG header")


def _reason(error: RuntimeError) -> str:
    """What torchvision says, without the name of its source file: `decode_jpeg, /…/decode_jpeg.cpp:38, Premature …`."""
    return first_line(error).rpartition(", ")[2]
