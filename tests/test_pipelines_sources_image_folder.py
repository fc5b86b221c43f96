"""Folders of images: interpretation of the tree, splits, broken images."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources import image_decoding
from metagmvae.pipelines.sources.image_scan import scan_some
from metagmvae.pipelines.sources.source import open_source

OPEN = Image.open


def png(value=120, size=(10, 8), mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root, files):
    """Write files: a list of names, or bytes by name."""
    if not isinstance(files, dict):
        files = {name: png(value=20 + number) for number, name in enumerate(files)}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def classes(source):
    return {split: sorted({r.class_name for r in records}) for split, records in source.splits.items()}


def assert_refused(root, *words, **options):
    with pytest.raises(DataError) as caught:
        open_source("folder", str(root), **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_images_in_one_folder_are_unlabelled_training_images(tmp_path):
    source = open_source("folder", str(tree(tmp_path, ["b.png", "a.png", "c.jpg.png", "notes.txt"])), size=6)
    assert [r.key for r in source.splits["train"]] == ["a.png", "b.png", "c.jpg.png"]
    assert classes(source) == {"train": [""]}
    block = source.load_block("train", [0, 1])
    assert block.shape == (2, 1, 6, 6)
    assert (block[0] == 21).all()
    assert (block[1] == 20).all()
    assert source.report["skipped"] == []


def test_a_crop_that_leaves_out_much_is_said_and_can_be_turned_off(tmp_path):
    """Spectrograms of 128 x 44 pixels: the middle square is 34% of them."""
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (44, 1)))
    for number in range(3):
        (tmp_path / "wide").mkdir(exist_ok=True)
        ramp.save(tmp_path / "wide" / f"{number}.png")
    cropped = open_source("folder", str(tmp_path / "wide"), size=44)
    assert cropped.files["crop"].startswith("the middle square of each image is used, 34% of the area of the median")
    assert np.ptp(cropped.load_block("train", [0])) < 50
    whole = open_source("folder", str(tmp_path / "wide"), size=44, crop=False)
    assert "crop" not in whole.files
    assert np.ptp(whole.load_block("train", [0])) > 120
    assert (cropped.preprocessing.crop, whole.preprocessing.crop) == ("center square", "none")
    assert cropped.fingerprint != whole.fingerprint
    tree(tmp_path / "square", {f"{number}.png": png(number, (40, 37)) for number in range(3)})
    assert "crop" not in open_source("folder", str(tmp_path / "square"), size=28).files


def test_splits_with_the_same_classes_are_joined_if_asked_for(tmp_path):
    """The layout of supervised learning."""
    files = [f"{split}/{name}/{n}.png" for split in ("train", "val", "test") for name in "abcd" for n in range(2)]
    assert_refused(tree(tmp_path, files), "test/a and train/a are classes with the same name", "--join-splits")
    source = open_source("folder", str(tmp_path), size=8, join_splits=True, fractions=(0.5, 0.25, 0.25))
    found = {name: split for split, names in classes(source).items() for name in names}
    assert sorted(found) == list("abcd")
    for split, records in source.splits.items():
        assert {record.key for record in records} == {file for file in files if found[file.split("/")[1]] == split}
    (tmp_path / "train").rename(tmp_path / "one")
    assert_refused(tmp_path / "one", "has no folders of the splits to join; omit --join-splits", join_splits=True)


def test_several_folders_are_classes_named_by_their_paths(tmp_path):
    source = open_source(
        "folder", str(tree(tmp_path, ["dog/1.png", "wild/cat/1.png", "wild/cat/2.png", "wild/ox/1.png"]))
    )
    assert [(r.key, r.class_name) for r in source.splits["train"]] == [
        ("dog/1.png", "dog"),
        ("wild/cat/1.png", "wild/cat"),
        ("wild/cat/2.png", "wild/cat"),
        ("wild/ox/1.png", "wild/ox"),
    ]
    assert source.report["classes"] == {"train": 3}
    unlabelled = open_source("folder", str(tmp_path), classes=False)
    assert classes(unlabelled) == {"train": [""]}
    assert unlabelled.fingerprint != source.fingerprint


def test_a_zip_file_with_one_common_folder_is_the_same_dataset(tmp_path):
    root = tree(tmp_path / "pictures", ["cat/1.png", "dog/1.png"])
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in root.rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    plain, zipped = (open_source("folder", str(tmp_path / name)) for name in ("pictures", "pictures.zip"))
    assert plain.fingerprint == zipped.fingerprint
    assert [r.key for r in plain.splits["train"]] == [r.key for r in zipped.splits["train"]]
    assert np.array_equal(plain.load_block("train", [0, 1]), zipped.load_block("train", [0, 1]))


def test_the_fingerprint_depends_on_content_names_and_options(tmp_path):
    root = tree(tmp_path, ["cat/1.png", "dog/1.png"])
    fingerprints = [open_source("folder", str(root), **o).fingerprint for o in ({}, {"size": 9}, {"invert": True})]
    assert open_source("folder", str(root)).fingerprint == fingerprints[0]
    (root / "dog" / "1.png").write_bytes(png(200))
    fingerprints.append(open_source("folder", str(root)).fingerprint)
    (root / "dog" / "1.png").rename(root / "dog" / "2.png")
    fingerprints.append(open_source("folder", str(root)).fingerprint)
    assert len(set(fingerprints)) == 5


def test_fractions_divide_the_classes_at_random(tmp_path):
    names = [f"c{number}" for number in range(10)]
    root = tree(tmp_path, [f"{name}/{number}.png" for name in names for number in range(2)])
    source = open_source("folder", str(root), fractions=(0.6, 0.2, 0.2))
    parts = classes(source)
    assert {split: len(part) for split, part in parts.items()} == {"train": 6, "validation": 2, "test": 2}
    assert sorted(name for part in parts.values() for name in part) == names
    again = open_source("folder", str(root), fractions=[0.6, 0.2, 0.2])
    assert classes(again) == parts
    assert again.fingerprint == source.fingerprint
    other = open_source("folder", str(root), fractions=(0.6, 0.2, 0.2), seed=1)
    assert classes(other) != parts
    assert other.fingerprint != source.fingerprint
    assert list(classes(open_source("folder", str(root), fractions=(0.5, 0, 0.5)))) == ["train", "test"]
    assert_refused(root, "fractions (0.98, 0.01, 0.01) cannot divide 10 classes", fractions=(0.98, 0.01, 0.01))


def test_split_folders_are_the_splits(tmp_path):
    files = ["train/1.png", "train/2.png", "val/cat/1.png", "val/dog/1.png", "test/ox/1.png", "test/hen/1.png"]
    source = open_source("folder", str(tree(tmp_path / "x", files)))
    assert classes(source) == {"train": [""], "validation": ["cat", "dog"], "test": ["hen", "ox"]}
    assert source.splits["test"][0].key == "test/hen/1.png"
    assert_refused(tmp_path / "x", "already has splits, as the folders are named", fractions=(0.5, 0, 0.5))
    one = open_source("folder", str(tree(tmp_path / "y", ["train/cat/1.png", "train/dog/1.png"])))
    assert classes(one) == {"train": ["cat", "dog"]}
    beside = open_source("folder", str(tree(tmp_path / "z", ["train/1.png", "plane/1.png"])))
    assert classes(beside) == {"train": ["plane", "train"]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["Cat/1.png", "cat/1.png"], "train/Cat and train/cat are classes with the same name"),
        (["caf\u00e9/1.png", "cafe\u0301/1.png"], "classes with the same name"),
        (
            ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"],
            "test/a and train/a are classes with",
        ),
        (["1.png", "cat/1.png"], ". and its subfolder cat both contain images"),
        (["a/1.png", "a/b/1.png", "c/1.png"], "a and its subfolder a/b both contain images"),
    ],
)
def test_ambiguous_trees_are_refused(tmp_path, files, words):
    root = tree(tmp_path, files)
    if len({path.name for path in root.iterdir()}) < len({name.split("/")[0] for name in files}):
        pytest.skip("this file system does not distinguish the two names")
    assert_refused(root, words)
    assert classes(open_source("folder", str(root), classes=False)) == {"train": [""]}


def test_folders_without_images_are_refused(tmp_path):
    assert_refused(tmp_path / "none", "no such file or folder")
    assert_refused(tmp_path, "contains no images (.png")
    assert_refused(tree(tmp_path, {"a.txt": b"x"}), "contains no images")
    with pytest.raises(DataError, match="--source"):
        open_source("folder")


def test_broken_images_are_skipped_and_listed_up_to_max_broken(tmp_path):
    complete = png(size=(40, 40))
    files = {f"cat/{number}.png": png() for number in range(17)}
    files |= {"cat/zero.png": b"", "cat/text.png": b"hello", "cat/cut.png": complete[:-30], "dog/1.png": png()}
    root = tree(tmp_path, files)
    assert_refused(root, "3 of 21 images cannot be decoded, more than max_broken = 0.01", "cat/cut.png: broken image")
    source = open_source("folder", str(root), max_broken=0.2)
    assert [each["name"] for each in source.report["skipped"]] == ["cat/cut.png", "cat/text.png", "cat/zero.png"]
    assert all("broken image" in each["reason"] for each in source.report["skipped"])
    assert source.load_block("train", range(18)).shape == (18, 1, 28, 28)
    assert source.report["images"] == {"train": 18}
    assert_refused(tree(tmp_path / "bad", {"a.png": b"", "b.png": b""}), "2 of 2 images", max_broken=1.0)


def test_images_of_all_modes_and_sizes_are_decoded(tmp_path):
    files = {
        "grey.png": png(90),
        "palette.png": png(0, mode="P"),
        "alpha.png": png((9, 9, 9, 0), mode="RGBA"),
        "colour.png": png((90, 90, 90), (300, 20), mode="RGB"),
        "one.png": png(1, (1, 1), mode="1"),
    }
    source = open_source("folder", str(tree(tmp_path, files)), size=5, channels=3)
    assert source.image_shape == (3, 5, 5)
    block = source.load_block("train", range(5))
    assert block[:, :, 2, 2].tolist() == [[255] * 3, [90] * 3, [90] * 3, [255] * 3, [0] * 3]
    inverted = open_source("folder", str(tmp_path), size=5, channels=3, invert=True)
    assert np.array_equal(inverted.load_block("train", range(5)), 255 - block)


def test_a_source_can_be_pickled(tmp_path):
    source = pickle.loads(pickle.dumps(open_source("folder", str(tree(tmp_path, ["a.png"])))))
    assert source.load_block("train", [0]).shape == (1, 1, 28, 28)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size is 0"),
        ({"channels": 2}, "channels is 2"),
        ({"seed": -1}, "seed is -1"),
        ({"max_broken": 1.5}, "max_broken is 1.5"),
        ({"fractions": (0.5, 0.5)}, "give three"),
        ({"fractions": (0.9, 0.2, 0.2)}, "sum to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "fractions is"),
        ({"fractions": (0, 0.5, 0.5)}, "a positive fraction for train"),
        ({"fractions": (0.5, 0.2, 0.3), "classes": False}, "need classes on"),
    ],
)
def test_invalid_options_are_refused_before_reading(options, words):
    assert_refused("/nowhere", words, **options)


def test_fractions_need_classes(tmp_path):
    assert_refused(tree(tmp_path, ["a.png", "b.png"]), "cannot divide 0 classes", fractions=(0.5, 0.25, 0.25))


def saved(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def gradient(number, factor, dtype):
    return ((np.arange(64).reshape(8, 8) * 4 + number) * factor).astype(dtype)


@pytest.mark.parametrize(
    ("kind", "dtype", "factor", "white"),
    [("TIFF", np.int32, 1, 255), ("PNG", np.uint16, 16, 4095), ("TIFF", np.uint16, 257, 65_535)],
)
def test_grey_values_of_more_than_8_bits_are_scaled_by_the_highest_one(tmp_path, kind, dtype, factor, white):
    files = {f"{name}/{n}.{kind.lower()}": saved(gradient(n, factor, dtype), kind) for name in "ab" for n in range(2)}
    source = open_source("folder", str(tree(tmp_path, files)), size=8)
    assert source.preprocessing.sixteen_bit_white == white
    assert f"4, values up to {253 * factor}, of which {white} becomes 255" in source.files["images_above_8_bits"]
    assert source.files["single_value_images"] == 0
    for row, number in enumerate((0, 1, 0, 1)):
        difference = source.load_block("train", [row])[0, 0].astype(int) - gradient(number, 1, int)
        assert np.abs(difference).max() <= 1
    eight_bit = open_source("folder", str(tree(tmp_path / "8", ["a/1.png", "b/1.png"])), size=8)
    assert eight_bit.preprocessing.sixteen_bit_white == 65_535
    assert "images_above_8_bits" not in eight_bit.files


def test_the_scan_opens_each_image_once(tmp_path, monkeypatch):
    for name, image in (("a.png", Image.new("L", (9, 6), 3)), ("b.png", Image.new("I;16", (8, 8), 300))):
        image.save(tmp_path / name)
    opened = []
    monkeypatch.setattr(image_decoding.Image, "open", lambda file, **o: opened.append(file) or OPEN(file, **o))
    scanned = scan_some(str(tmp_path), ["a.png", "b.png"], Preprocessing.of_shape((1, 6, 6), invert=False))
    assert len(opened) == 2
    assert (scanned.square, scanned.highest, scanned.blank) == ([6 / 9, 1.0], {"b.png": 300}, ["a.png", "b.png"])


def test_images_of_one_single_value_are_counted(tmp_path):
    files = {"a/blank.png": png(), "a/1.png": saved(gradient(0, 1, np.uint8), "PNG"), "b/1.png": png(3, mode="P")}
    files["b/transparent.png"] = png((9, 9, 9, 0), mode="RGBA")
    report = open_source("folder", str(tree(tmp_path, files))).files
    assert report["single_value_images"] == 3
    assert report["single_value_names"] == "a/blank.png, b/1.png, b/transparent.png"


def test_every_file_is_read_or_counted(tmp_path):
    image = saved(gradient(0, 1, np.uint8), "PNG")
    photo = saved(gradient(0, 1, np.uint8), "JPEG")
    files = {f"cat/{number}.png": image for number in range(2)} | {f"dog/{number}.jfif": photo for number in range(3)}
    files |= {"ox/1.JPE": photo, "ox/2": image, "ox/3.pbm": b"P1\n2 2\n0 1 1 0\n", "ox/4.avif": saved_avif()}
    files |= {"cat/IMG_1.HEIC": b"\0\0\0\x18ftypheic", "hen/1.heic": b"x", "hen/2.heic": b"x", ".git/config": b"x"}
    files |= {"labels.csv": b"a,b", "notes": b"text"}
    root = tree(tmp_path / "files", files)
    (root / "empty" / "folder").mkdir(parents=True)
    source = open_source("folder", str(root))
    assert classes(source) == {"train": ["cat", "dog", "ox"]}
    report = source.files
    assert report["files"] == {"seen": 15, "read": 9, "left_out": 6}
    assert report["suffixes"] == {".jfif": 3, ".png": 2, ".jpe": 1, "no suffix": 1, ".pbm": 1, ".avif": 1}
    assert report["left_out"] == [
        {"reason": "hidden", "files": 1, "names": ".git"},
        {"reason": "no suffix", "files": 1, "names": "notes"},
        {"reason": "suffix .csv", "files": 1, "names": "labels.csv"},
        {"reason": "suffix .heic", "files": 3, "names": "cat/IMG_1.HEIC, hen/1.heic, hen/2.heic"},
    ]
    assert report["folders_without_images"] == ["empty", "hen"]
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    zipped = open_source("folder", str(tmp_path / "files.zip"))
    assert zipped.fingerprint == source.fingerprint
    assert zipped.files["folders_without_images"] == report["folders_without_images"]


def saved_avif():
    return saved(gradient(0, 1, np.uint8), "AVIF")


def test_a_class_whose_images_are_all_broken_is_named(tmp_path):
    files = {"cat/1.png": png(), "dog/1.png": png(), "ox/1.png": b"broken"}
    source = open_source("folder", str(tree(tmp_path, files)), max_broken=0.5)
    assert source.files["folders_without_images"] == ["ox"]
    assert source.files["files"] == {"seen": 3, "read": 2, "left_out": 1}


def test_a_folder_without_known_images_says_what_it_has(tmp_path):
    assert_refused(tree(tmp_path, {"a.heic": b"x", "b.heic": b"x"}), "contains no images", "it has 2 with suffix .heic")
