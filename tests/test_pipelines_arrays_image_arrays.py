"""Images that Python holds, and NumPy files: layouts, classes, splits, fingerprint, and what is refused."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

import metagmvae
from metagmvae.infra.api.testing import check_source
from metagmvae.infra.cli import main
from metagmvae.pipelines.arrays.file_rows import FileRows
from metagmvae.pipelines.arrays.image_arrays import Columns, open_images
from metagmvae.pipelines.arrays.numpy_images import read_numpy
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.source import open_source
from metagmvae.pipelines.sources.splits import SplitRequest, divide_groups

RGB = np.random.default_rng(0).integers(0, 256, (24, 28, 28, 3), dtype=np.uint8)
LABELS = np.arange(24) % 6


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Column:
    """A sequence that decodes an image when it is asked for, as a column of Hugging Face."""

    def __len__(self):
        return len(RGB)

    def __getitem__(self, number):
        return Image.fromarray(RGB[number])


def test_all_forms_of_an_image_give_the_same_dataset(tmp_path):
    for number, pixels in enumerate(RGB):
        (tmp_path / f"{number}.png").write_bytes(png(pixels))
    forms = [
        RGB,
        RGB.transpose(0, 3, 1, 2),
        [Image.fromarray(pixels) for pixels in RGB],
        [png(pixels) for pixels in RGB],
        [tmp_path / f"{number}.png" for number in range(24)],
        [f"{tmp_path}/{number}.png" for number in range(24)],
        Column(),
    ]
    sources = [open_images(form, LABELS, validation_classes=2, test_classes=2, seed=3) for form in forms]
    assert len({source.fingerprint for source in sources}) == 1
    for source in sources:
        for records in source.splits.values():
            for record in records:
                number = int(record.key)
                np.testing.assert_array_equal(record.load(), RGB[number].transpose(2, 0, 1))
                assert record.class_name == str(LABELS[number])
        assert [len(source.splits[split]) for split in ("train", "validation", "test")] == [8, 8, 8]
    words = np.array([f"class {label}" for label in LABELS], dtype=object)
    assert {record.class_name for record in open_images(RGB, words).splits["train"]} == set(words)
    grey = open_images(RGB[..., 0])
    assert (grey.image_shape, list(grey.splits), grey.splits["train"][5].class_name) == ((1, 28, 28), ["train"], "")


def test_the_fingerprint_changes_with_pixels_classes_splits_and_options():
    other = RGB.copy()
    other[23, 27, 27, 2] ^= 1
    options = {"validation_classes": 2, "test_classes": 2}
    fingerprints = [
        open_images(RGB, LABELS, **options).fingerprint,
        open_images(other, LABELS, **options).fingerprint,
        open_images(RGB, LABELS[::-1], **options).fingerprint,
        open_images(RGB, LABELS, **options, seed=1).fingerprint,
        open_images(RGB, LABELS, **options, invert=True).fingerprint,
        open_images(RGB).fingerprint,
        open_images(RGB, LABELS).fingerprint,
        open_images(RGB, LABELS[::-1]).fingerprint,  # all of these are in `train`
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_size_and_crop_are_those_of_image_files():
    wide = np.tile(np.arange(128, dtype=np.uint8), (200, 44, 1))
    assert open_images(wide).image_shape == (1, 44, 44)
    assert np.ptp(open_images(wide).splits["train"][0].load()) < 50
    assert np.ptp(open_images(wide, crop=False, size=20).splits["train"][0].load()) > 110
    narrow = np.stack([np.full((40, 3), value, np.uint8) for value in (10, 20, 30)])  # (C, H, W)
    assert open_images(narrow[None], size=5).splits["train"][0].load()[:, 0, 0].tolist() == [10, 20, 30]
    assert open_images(np.zeros((1, 300, 400, 3), np.uint8)).image_shape == (3, 84, 84)
    assert open_images(np.zeros((1, 8, 9), np.uint8), channels=3).image_shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("images", "labels", "options", "reason"),
    [
        ([], None, {}, "there are no images"),
        (RGB / 255, None, {}, r"image 0 is float64 \(28, 28, 3\); give uint8 from 0 to 255"),
        ([RGB[0], RGB[0, 0, 0]], None, {}, r"image 1 is uint8 \(3,\)"),
        ([RGB[0], b"none"], None, {}, "image 1: broken image"),
        ([RGB[0], "none.png"], None, {}, r"image 1: none.png cannot be read \(No such file"),
        ((pixels for pixels in RGB), None, {}, "images are one generator, without a length; give a list"),
        (None, None, {}, "images are one NoneType, without a length"),
        ([b"none"], None, {}, "image 0: broken image"),
        (RGB, LABELS[:5], {}, r"labels have shape \(5,\) for 24 images"),
        (RGB, np.zeros((24, 14)), {}, r"labels have shape \(24, 14\)"),
        (RGB, LABELS / 2, {}, "labels are float64; give whole numbers or words"),
        (RGB, ["a"] * 23 + [""], {}, "label 23 is empty"),
        (RGB, [None] * 24, {}, "labels are object"),
        (RGB, LABELS, {"validation_classes": 4, "test_classes": 4}, "has 6 classes, which cannot give 4"),
        (RGB, None, {"validation_classes": 2}, "the folders are no classes"),
        (RGB, LABELS, {"size": 0}, "size is 0"),
        (RGB, LABELS, {"channels": 2}, "channels is 2"),
    ],
)
def test_wrong_images_are_one_line(images, labels, options, reason):
    with pytest.raises(DataError, match=reason) as caught:
        open_images(images, labels, **options)
    assert "\n" not in str(caught.value)


def test_prepare_reads_files_of_medmnist_and_of_numpy(tmp_path, capsys):
    parts = {"train": slice(0, 12), "val": slice(12, 18), "test": slice(18, 24)}
    arrays = {f"{part}_images": RGB[rows] for part, rows in parts.items()}
    arrays |= {f"{part}_labels": LABELS[rows, None] for part, rows in parts.items()}
    np.savez(tmp_path / "medmnist.npz", **arrays)
    np.savez_compressed(tmp_path / "other.npz", X=RGB, y=LABELS)
    np.save(tmp_path / "images.npy", RGB)
    words = ["--source", str(tmp_path / "medmnist.npz"), "--out", str(tmp_path / "out"), "--seed", "1", "--json"]
    assert main(["prepare", "npz", *words, "--validation-classes", "2", "--test-classes", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["classes"], answer["image_shape"]) == ({"train": 2, "validation": 2, "test": 2}, [3, 28, 28])
    assert answer["division"] == "2 validation and 2 test classes of 6, drawn with seed 1"
    dataset = Dataset.open(tmp_path / "out")
    for image, row in zip(dataset.images("test"), dataset.index("test").to_pylist(), strict=True):
        number = int(row["key"])
        np.testing.assert_array_equal(image, RGB[number].transpose(2, 0, 1))
        assert row["class_name"] == str(LABELS[number])
    check_source("npz", str(tmp_path / "other.npz"))
    assert open_source("npz", str(tmp_path / "other.npz")).report["classes"] == {"train": 6}
    assert open_source("npz", str(tmp_path / "images.npy")).report["classes"] == {"train": 0}


class Touch:
    def __reduce__(self):
        return (open, ("touched", "w"))


def test_other_files_are_refused_and_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(pickle.dumps(Touch()))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([Touch()], dtype=object))
    np.savez(tmp_path / "objects.npz", images=np.array([Touch()], dtype=object))
    np.savez(tmp_path / "names.npz", pictures=RGB)
    np.savez(tmp_path / "floats.npz", images=RGB / 255)
    np.savez(tmp_path / "cut.npz", images=RGB)
    (tmp_path / "folder").mkdir()
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, reason in {
        "batch": "no NumPy file of numbers",
        "text.npy": "no NumPy file of numbers",
        "objects.npy": "holds Python objects; save arrays of numbers and words",
        "objects.npz": "holds Python objects; save arrays of numbers and words",
        "cut.npz": "no NumPy file of numbers",
        "names.npz": "holds the arrays pictures; name them images and labels",
        "floats.npz": "image 0 is float64",
        "none.npz": "no such file",
        "folder": "is a folder; give one .npz or .npy file",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            open_source("npz", name)
        assert str(caught.value).startswith(f"{name}: ")
    assert not (tmp_path / "touched").exists()
    with pytest.raises(DataError, match="no NumPy file given"):
        open_source("npz")


def test_columns_of_pandas_and_files_of_hugging_face(tmp_path):
    """Numbers of the rows are those of the larger table from which they were chosen."""
    pandas = pytest.importorskip("pandas")
    expected = open_images(RGB, LABELS)
    table = pandas.DataFrame({"image": [{"bytes": png(image), "path": None} for image in RGB], "label": LABELS})
    table.index += 100
    opened = open_images(table["image"], table["label"])
    assert opened.fingerprint == expected.fingerprint


def test_prepare_images_writes_a_dataset_of_python_objects(tmp_path):
    data = metagmvae.prepare_images(Column(), LABELS, out=tmp_path / "out", test_classes=2, seed=2)
    assert (data.name, data.image_shape, data.classes) == ("images", (3, 28, 28), {"train": 4, "test": 2})
    dataset = data.open()
    assert dataset.manifest["settings"]["seed"] == 2
    for image, row in zip(dataset.images("train"), dataset.index("train").to_pylist(), strict=True):
        np.testing.assert_array_equal(image, RGB[int(row["key"])].transpose(2, 0, 1))
    again = metagmvae.prepare_images(RGB, LABELS, out=tmp_path / "out", test_classes=2, seed=2)
    assert again == data
    assert metagmvae.prepare_images(RGB, out=tmp_path / "plain").classes == {"train": 0}
    with pytest.raises(DataError, match="contains another dataset"):
        metagmvae.prepare_images(RGB, LABELS, out=tmp_path / "out", test_classes=3)


def test_the_seed_draws_other_classes_of_a_folder(tmp_path, capsys):
    for number, label in enumerate(LABELS):
        (tmp_path / "in" / f"class {label}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"class {label}" / f"{number}.png").write_bytes(png(RGB[number]))
    drawn = set()
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        words = ["--source", str(tmp_path / "in"), "--out", str(out), "--seed", str(seed), "--size", "8", "--json"]
        words += ["--validation-classes", "2"]
        assert main(["prepare", "folder", *words, "--test-classes", "2"]) == 0
        assert json.loads(capsys.readouterr().out)["division"].endswith(f"drawn with seed {seed}")
        drawn.add(tuple(Dataset.open(out).class_names("test")))
    assert len(drawn) > 1


def test_objects_of_hugging_face_that_are_no_columns_are_refused_with_what_to_give(tmp_path):
    """Rows of a dataset, a dataset of several splits, a stream; images that are not decoded are read."""
    file = tmp_path / "0.png"
    Image.fromarray(RGB[0]).save(file)
    for images, reason in (
        (
            [{"image": Image.fromarray(RGB[0]), "label": 0}],
            "image 0 is a row with image, label; give columns",
        ),
        ({"train": RGB, "test": RGB}, "images are a dict of train, test; give the images of one"),
        (iter(RGB), "images are one .*, without a length; give a list of images"),
    ):
        with pytest.raises(DataError, match=reason):
            open_images(images)
    images = [{"bytes": None, "path": str(file)}, {"bytes": file.read_bytes(), "path": None}]
    first, second = (record.load() for record in open_images(images).splits["train"])
    np.testing.assert_array_equal(first, second)


def test_groups_of_images_are_kept_together(tmp_path):
    groups = [number // 2 for number in range(len(LABELS))]
    expected, said = divide_groups("", list(map(str, groups)), list(map(str, LABELS)), SplitRequest(), 2)
    source = open_images(RGB, LABELS, groups=groups, seed=2)
    division = source.files["division"]
    assert division.startswith(f"{said}; the splits share classes; episodes leave out classes of one group: 0 (test), ")
    assert division.endswith("and 2 more")
    found = {int(record.key): split for split, records in source.splits.items() for record in records}
    assert [found[number] for number in range(len(LABELS))] == expected
    np.savez(tmp_path / "a.npz", images=RGB, labels=LABELS, case=groups)
    assert open_source("npz", str(tmp_path / "a.npz"), groups="case", seed=2).fingerprint == source.fingerprint
    for options, reason in (
        ({"groups": "x"}, "holds the arrays images, labels, case, and none is x; give the name of one"),
        ({"groups": "case", "classes": False}, "--groups case divides classes, and --unlabelled takes none"),
        ({"groups": "case", "label": "nothing"}, "and none is nothing"),
    ):
        with pytest.raises(DataError, match=reason):
            open_source("npz", str(tmp_path / "a.npz"), **options)
    with pytest.raises(DataError, match="groups need classes; give labels"):
        open_images(RGB, groups=groups)


def test_arrays_of_other_names_are_chosen_and_parts_are_not_held_in_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", front=RGB, back=255 - RGB, kind=LABELS, one=np.float32(3))
    chosen = open_source("npz", str(tmp_path / "a.npz"), image="back", label="kind")
    assert chosen.fingerprint == open_images(255 - RGB, LABELS).fingerprint
    assert open_source("npz", str(tmp_path / "a.npz"), image="front").fingerprint == open_images(RGB).fingerprint
    with pytest.raises(DataError, match="is a single value; give an array"):
        open_source("npz", str(tmp_path / "a.npz"), image="one")
    table = read_numpy(str(tmp_path / "a.npz"), Columns(True, "front", None, None))
    assert all(isinstance(part, FileRows) for part in table.images.parts)
