"""TIFF images of several bands and colours of 16 bits: what is not used is said, and what is not read is named."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.image_decoding import (
    FIRST_BANDS,
    SIXTEEN_BIT_COLOUR,
    decode_image,
    image_header,
    measure_image,
)
from metagmvae.pipelines.sources.source import open_source

LONG = {256, 257, 273, 278, 279}
"""Tags of 32 bits; the others have 16."""


def tiff(pixels, extra=None, order="<"):
    """A plain TIFF file of (H, W, bands), without compression; `extra`: meanings of the bands after grey or RGB."""
    height, width, bands = pixels.shape
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "f": 3}[pixels.dtype.kind]
    tags = {256: [width], 257: [height], 258: [8 * pixels.dtype.itemsize] * bands, 259: [1]}
    tags |= {262: [2 if bands > 2 else 1], 273: [0], 277: [bands], 278: [height], 279: [len(content)], 284: [1]}
    tags |= ({338: extra} if extra else {}) | {339: [kind] * bands}
    end = 8 + 2 + 12 * len(tags) + 4
    packed = {tag: struct.pack(order + ("I" if tag in LONG else "H") * len(v), *v) for tag, v in tags.items()}
    far = {tag: value for tag, value in packed.items() if len(value) > 4}
    packed[273] = struct.pack(order + "I", end + sum(map(len, far.values())))
    places, entries = end, b""
    for tag, value in sorted(packed.items()):
        field = value.ljust(4, b"\0")
        if tag in far:
            field, places = struct.pack(order + "I", places), places + len(value)
        entries += struct.pack(order + "HHI", tag, 4 if tag in LONG else 3, len(tags[tag])) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + b"".join(far[tag] for tag in sorted(far)) + content


def bands(number, dtype=np.uint8, top=200):
    return (np.random.default_rng(number).random((8, 8, number)) * top).astype(dtype)


def losses(data):
    return measure_image(data, "x", size=8, channels=3, invert=False, white=255, crop=True).losses


def png(mode, **options):
    file = io.BytesIO()
    Image.fromarray(bands(len(mode)), mode).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("order", "<>")
def test_further_bands_are_not_used_and_that_is_said(order):
    pixels = bands(4)
    data = tiff(pixels, extra=[0], order=order)
    np.testing.assert_array_equal(decode_image(data, "x", size=8, channels=3), pixels[..., :3].transpose(2, 0, 1))
    assert losses(data) == (FIRST_BANDS,)
    assert losses(tiff(bands(5), extra=[0, 0], order=order)) == (FIRST_BANDS,)
    assert losses(tiff(bands(2), extra=[0], order=order)) == (FIRST_BANDS,)


def test_colours_of_sixteen_bits_are_divided_and_that_is_said():
    pixels = bands(3, np.uint16, 65_000)
    data = tiff(pixels)
    np.testing.assert_array_equal(decode_image(data, "x", size=8, channels=3), (pixels >> 8).transpose(2, 0, 1))
    assert losses(data) == (SIXTEEN_BIT_COLOUR,)
    assert losses(tiff(bands(4, np.uint16), extra=[0])) == (FIRST_BANDS, SIXTEEN_BIT_COLOUR)


@pytest.mark.parametrize("data", [tiff(bands(3)), tiff(bands(1)), tiff(bands(4), extra=[2]), png("RGB"), png("RGBA")])
def test_usual_images_lose_nothing(data):
    assert losses(data) == ()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("number", "dtype"), [(13, np.uint16), (13, np.uint8), (4, np.float32)])
def test_bands_that_are_not_read_are_named(number, dtype, order, capfd, caplog):
    data = tiff(bands(number, dtype), extra=[0] * (number - 3), order=order)
    for read in (lambda: decode_image(data, "x.tif", size=8, channels=3), lambda: image_header(data, "x.tif")):
        with pytest.raises(DataError, match=rf"^x.tif: a TIFF image of {number} bands .* save 1 or 3 of them with 8"):
            read()
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


@pytest.mark.parametrize("length", [4, 7, 9, 40, 100])
def test_a_truncated_tiff_is_a_broken_image(length):
    with pytest.raises(DataError, match=r"x: (broken image|a TIFF image of 13 bands)"):
        decode_image(tiff(bands(13), extra=[0] * 10)[:length], "x", size=8, channels=3)


def test_prepare_counts_and_names_the_images(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.tif").write_bytes(tiff(bands(4), extra=[0]))
    (tmp_path / "8.tif").write_bytes(tiff(bands(3, np.uint16, 9_000)))
    said = open_source("folder", str(tmp_path), size=8).files["not_used"]
    assert said == [
        f"7 images (0.tif, 1.tif, 2.tif, 3.tif, 4.tif and 2 more): {FIRST_BANDS}",
        f"1 image (8.tif): {SIXTEEN_BIT_COLOUR}",
    ]
