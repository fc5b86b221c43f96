"""The look at a folder of images: size, colour, drawings or photographs, polarity; and the default division."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.glyphs import open_glyphs
from metagmvae.pipelines.sources.image_files import list_images
from metagmvae.pipelines.sources.image_survey import survey_images
from metagmvae.pipelines.sources.source import open_source
from metagmvae.pipelines.sources.splits import default_held_out


def survey(root):
    return survey_images(str(root), [entry.name for entry in list_images(root).entries])


def write(root, name, pixels, kind="PNG"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / name, kind)


def photo(seed, height=40, width=52, colour=True):
    """A smooth random image without an even background."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image if colour else image.convert("L"))


@pytest.mark.parametrize("dark_on_bright", [True, False])
def test_drawings_and_their_polarity(tmp_path, dark_on_bright):
    source = open_glyphs(classes=(4, 0, 0), drawings=5)
    for number, pixels in enumerate(source.load_block("train", range(20))[:, 0]):
        write(tmp_path, f"{number}.png", 255 - pixels if dark_on_bright else pixels)
    found = survey(tmp_path)
    assert (found.images, found.sample, found.channels) == (20, 20, 1)
    assert found.drawn >= 0.9
    assert found.strokes
    assert found.inverted == dark_on_bright
    assert found.size == 28


def test_photographs_are_no_drawings_and_neither_is_one_object_on_white(tmp_path):
    for number in range(10):
        write(tmp_path / "photos", f"{number}.jpg", photo(number), "JPEG")
        product = Image.new("L", (60, 60), 255)
        ImageDraw.Draw(product).ellipse((12 + number, 15, 42, 45), fill=40)
        write(tmp_path / "products", f"{number}.png", np.asarray(product))
        write(tmp_path / "blank", f"{number}.png", np.full((30, 30), 255, np.uint8))
    for name in ("photos", "products", "blank"):
        assert survey(tmp_path / name).drawn == 0, name
        assert not survey(tmp_path / name).inverted


def test_the_size_is_the_median_shorter_side_from_28_to_84(tmp_path):
    for number, (height, width) in enumerate([(40, 60), (64, 50), (300, 70)]):
        write(tmp_path / "a", f"{number}.png", photo(number, height, width))
    write(tmp_path / "small", "1.png", photo(0, 8, 8))
    write(tmp_path / "large", "1.png", photo(0, 120, 100))
    assert survey(tmp_path / "a").sides == (40, 50, 70)
    assert [survey(tmp_path / name).size for name in ("a", "small", "large")] == [50, 28, 84]


def test_one_image_with_colour_is_enough(tmp_path):
    for number in range(8):
        write(tmp_path, f"{number}.jpg", np.repeat(photo(number, colour=False)[..., None], 3, axis=2), "JPEG")
    assert survey(tmp_path).channels == 1
    write(tmp_path, "z.png", photo(9))
    assert survey(tmp_path).channels == 3


def test_broken_images_are_ignored_unless_all_are_broken(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 1 images cannot be decoded: .*broken\.png: broken image"):
        survey(tmp_path)
    write(tmp_path, "1.png", photo(1))
    assert survey(tmp_path).sample == 1
    assert survey(tmp_path).images == 2


def test_prepare_keeps_colour_and_size_and_says_so(tmp_path, capsys):
    for number in range(4):
        write(tmp_path / "in", f"{number}.jpg", photo(number), "JPEG")
    assert main(["prepare", "folder", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["image_shape"] == [3, 40, 40]
    assert answer["channels"] == 3
    assert answer["samples"] == {"train": 4}
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["preprocessing"]["channels"] == 3
    assert manifest["preprocessing"]["size"] == [40, 40]


def test_dark_drawings_get_a_note_unless_they_are_inverted(tmp_path):
    source = open_glyphs(classes=(1, 0, 0), drawings=5)
    for number, pixels in enumerate(source.load_block("train", range(5))[:, 0]):
        write(tmp_path, f"{number}.png", 255 - pixels)
    assert "--invert" in open_source("folder", str(tmp_path)).files["note"]
    assert "note" not in open_source("folder", str(tmp_path), invert=True).files


def classes(root, sizes):
    buffer = io.BytesIO()
    Image.fromarray(photo(0)).save(buffer, "PNG")
    for number, size in enumerate(sizes):
        for image in range(size):
            path = root / f"c{number:02d}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
    return root


@pytest.mark.parametrize(
    ("sizes", "number"),
    [
        ([20] * 100, 20),
        ([20] * 20, 5),
        ([20] * 30, 6),
        ([20] * 19, 0),
        ([19] * 100, 0),
        ([20] * 10 + [3] * 50, 5),
        ([20] * 9 + [3] * 50, 0),
        ([], 0),
    ],
)
def test_the_default_number_of_held_out_classes(sizes, number):
    assert default_held_out(sizes) == number


def test_class_folders_are_divided_by_default(tmp_path):
    root = classes(tmp_path, [20] * 12 + [2] * 10)
    source = open_source("folder", str(root), size=28)
    assert source.report["classes"] == {"train": 12, "validation": 5, "test": 5}
    held_out = {split: {r.class_name for r in source.splits[split]} for split in ("validation", "test")}
    assert all(name < "c12" for names in held_out.values() for name in names), "small classes make no episodes"
    assert not held_out["validation"] & held_out["test"]
    assert "5 validation and 5 test classes of 22, drawn with seed 0" in source.files["division"]
    assert open_source("folder", str(root), size=28).fingerprint == source.fingerprint
    assert open_source("folder", str(root), size=28, seed=1).fingerprint != source.fingerprint


def test_numbers_of_held_out_classes(tmp_path):
    root = classes(tmp_path, [3, 3, 4, 4, 5, 5])
    assert "of 6 classes, 0 have at least 20 images" in open_source("folder", str(root)).files["division"]
    source = open_source("folder", str(root), validation_classes=2, test_classes=2)
    assert source.report["classes"] == {"train": 2, "validation": 2, "test": 2}
    assert {r.class_name for r in source.splits["train"]} == {"c00", "c01"}, "the largest classes are held out"
    only_test = open_source("folder", str(root), test_classes=3)
    assert only_test.report["classes"] == {"train": 3, "test": 3}
    none = open_source("folder", str(classes(tmp_path / "x", [20] * 20)), validation_classes=0, test_classes=0)
    assert none.report["classes"] == {"train": 20}
    assert none.files["division"] == "no validation and test classes, as requested"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_classes": -1}, "validation_classes is -1"),
        ({"test_classes": 1}, "test_classes is 1, but an episode has at least 2 classes"),
        ({"validation_classes": 2, "fractions": (0.5, 0.25, 0.25)}, "validation_classes and fractions"),
        ({"validation_classes": 2, "classes": False}, "validation_classes is 2, but the folders are no classes"),
        ({"validation_classes": 2, "test_classes": 2}, "has 4 classes, which cannot give 2 for validation, 2 for test"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, options, words, capsys):
    root = classes(tmp_path / "in", [2] * 4)
    with pytest.raises(DataError, match=words):
        open_source("folder", str(root), **options)
    request = ["prepare", "folder", "--source", str(root), "--out", str(tmp_path / "out")]
    request += [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if key.endswith("classes")][:2]
    if set(options) <= {"validation_classes", "test_classes"}:
        assert main([r for r in request if r != "--classes=False"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_numbers_need_class_folders(tmp_path):
    write(tmp_path / "flat", "1.png", photo(1))
    with pytest.raises(DataError, match="has 0 classes"):
        open_source("folder", str(tmp_path / "flat"), test_classes=2)
    for split in ("train", "test"):
        write(tmp_path / "splits" / split, f"{split}.png", photo(1))
    with pytest.raises(DataError, match="already has splits, as the folders are named"):
        open_source("folder", str(tmp_path / "splits"), test_classes=2)
