"""Image files of all modes become 8-bit pixels of one size; damaged files give one line with the file name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources import image_decoding
from metagmvae.pipelines.sources.image_decoding import apply_preprocessing, decode_image, is_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image, kind="PNG", *, size=4, channels=1, invert=False, **options):
    return decode_image(encoded(image, kind, **options), "x", size=size, channels=channels, invert=invert)


def flat(mode, value, size=(4, 4)):
    return Image.new(mode, size, value)


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (flat("L", 90), 90),
        (flat("1", 1), 255),
        (flat("LA", (90, 255)), 90),
        (flat("LA", (90, 0)), 255),
        (flat("RGB", (90, 90, 90)), 90),
        (flat("RGBA", (0, 0, 0, 0)), 255),
        (flat("RGBA", (90, 90, 90, 255)), 90),
        (Image.fromarray(np.full((4, 4), 65_535, np.uint16)), 255),
        (Image.fromarray(np.full((4, 4), 257 * 90, np.uint16)), 90),
    ],
)
def test_all_modes_are_decoded(image, grey):
    pixels = decoded(image)
    assert pixels.shape == (1, 4, 4)
    assert pixels.dtype == np.uint8
    assert (pixels == grey).all()
    assert (decoded(image, invert=True) == 255 - grey).all()
    assert (decoded(image, channels=3) == grey).all()


def test_palettes_with_and_without_transparency():
    palette = flat("P", 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert decoded(palette, channels=3)[:, 0, 0].tolist() == [10, 200, 30]
    assert decoded(palette, channels=3, transparency=1)[:, 0, 0].tolist() == [255, 255, 255]


def test_colour_images_have_channels_first():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert np.array_equal(decoded(image, channels=3), np.asarray(image).transpose(2, 0, 1))


def test_a_wide_image_is_cropped_to_its_centre():
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, 4:8] = 200
    assert (decoded(Image.fromarray(pixels)) == 200).all()
    assert (decoded(Image.fromarray(pixels.T)) == 200).all()


def test_one_pixel_and_very_long_images_are_decoded():
    assert (decoded(flat("L", 7, (1, 1)), size=28) == 7).all()
    assert decoded(flat("L", 7, (1, 3000)), size=5).shape == (1, 5, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    upright = np.array([[10, 60], [110, 160]], np.uint8).repeat(8, 0).repeat(8, 1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decoded(Image.fromarray(np.ascontiguousarray(stored)), size=16, exif=exif)
    assert np.array_equal(pixels[0], upright)


def test_the_first_frame_of_an_animation_is_used():
    frames = [flat("L", 10), flat("L", 250)]
    assert (decoded(frames[0], "GIF", save_all=True, append_images=frames[1:]) == 10).all()
    assert (decoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]) == 10).all()


def test_reduced_decoding_of_a_large_jpeg_agrees_with_full_decoding():
    ramp = np.add.outer(np.arange(800), np.arange(1000)) / 1800 * 255
    data = encoded(Image.fromarray(ramp.astype(np.uint8)), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        full = np.asarray(image.crop((100, 0, 900, 800)).resize((28, 28), Image.Resampling.LANCZOS))
    pixels = decode_image(data, "x", size=28, channels=1)[0]
    assert np.abs(pixels.astype(int) - full).max() <= 3


@pytest.mark.parametrize("size", [(128, 44), (3, 40), (20, 20)])
def test_without_the_crop_the_whole_image_is_resized(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    whole = np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    box = (left, top, left + side, top + side)
    square = np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS, box)).transpose(2, 0, 1)
    cropped = Preprocessing.of_shape((3, 28, 28), invert=False)
    uncropped = cropped.model_copy(update={"crop": "none"})
    array = np.asarray(image).transpose(2, 0, 1)
    for form in (encoded(image), image, array):
        np.testing.assert_array_equal(apply_preprocessing(form, "x", uncropped), whole)
        np.testing.assert_array_equal(apply_preprocessing(form, "x", cropped), square)


def assert_refused(data, *words):
    with pytest.raises(DataError) as caught:
        decode_image(data, "cat/1.png", size=4, channels=1)
    assert "\n" not in str(caught.value)
    for word in ("cat/1.png", *words):
        assert word in str(caught.value)


def test_files_that_are_not_images_are_refused(monkeypatch):
    assert_refused(b"", "broken image")
    assert_refused(b"hello", "unknown image format")
    complete = encoded(Image.effect_noise((64, 64), 60))
    assert_refused(complete[: len(complete) // 2], "broken image")
    assert_refused(encoded(flat("F", 0.5), "TIFF"), "floating-point")
    assert_refused(encoded(flat("I", 70_000), "TIFF"), "exceed 16 bits")
    assert_refused(b"P5\n0 0\n255\n", "cat/1.png")
    header = bytearray(encoded(flat("L", 1)))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    assert_refused(bytes(header), "more than 64000000 pixels")
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 15)
    assert_refused(encoded(flat("L", 1)), "4 x 4 pixels, more than 15")


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"exif": True}), ("GIF", {}), ("TIFF", {}), ("BMP", {})]
)
def test_damaged_files_raise_only_data_errors(kind, options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8))
    if options:
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "description"
        options = {"exif": exif}
    data = np.frombuffer(encoded(image, kind, **options), np.uint8)
    messages = []
    for _ in range(300):
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
        try:
            decode_image(damaged.tobytes(), "x", size=4, channels=1)
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_no_program_is_started_for_an_eps_file(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert_refused(page, "unknown image format")
    assert not is_image(io.BytesIO(page))


@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI"])
def test_formats_that_are_not_on_the_list_are_refused(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 90, 90)).save(buffer, kind)
    assert_refused(buffer.getvalue(), "unknown image format")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"])
def test_formats_on_the_list_are_recognised_by_content(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 90, 90)).save(buffer, kind)
    assert is_image(io.BytesIO(buffer.getvalue()))
    assert abs(int(decode_image(buffer.getvalue(), "x", size=4, channels=1)[0, 0, 0]) - 90) <= 2


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_bmp_file_with_an_unset_alpha_channel_is_opaque(alpha):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = (4 * np.arange(64).reshape(8, 8, 1)).astype(np.uint8)
    pixels[..., 3] = alpha
    content = pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, 8, 8, 1, 32, 3, len(content), 0, 0, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    data = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(content), 0, 0, 14 + len(header)) + header + content
    assert np.array_equal(decode_image(data, "x", size=8, channels=1)[0], pixels[..., 0])


def test_an_array_is_prepared_like_a_file():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 9), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    for shape in ((1, 6, 6), (3, 6, 6), (3, 9, 9)):
        preprocessing = Preprocessing.of_shape(shape, invert=True)
        from_file = apply_preprocessing(buffer.getvalue(), "x", preprocessing)
        assert np.array_equal(apply_preprocessing(pixels, "x", preprocessing), from_file)
        assert from_file.shape == shape
    with pytest.raises(DataError, match=r"x: pixels are float64 \(3, 12, 9\); give uint8"):
        apply_preprocessing(pixels.astype(float), "x", preprocessing)
    with pytest.raises(DataError, match="give uint8"):
        apply_preprocessing(pixels[0], "x", preprocessing)
