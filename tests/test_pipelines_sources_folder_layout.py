"""Split folders are recognised by their usual names; what can be read in two ways is refused."""

import pytest

from metagmvae.pipelines.archives.entries import Entry
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.folder_layout import LabelRequest, read_layout


def splits(*folders):
    """Class names by split, of a tree with two images in each folder."""
    entries = [Entry(f"{folder}/{number}.png", 0, 0) for folder in folders for number in range(2)]
    result: dict[str, list[str]] = {}
    for image in read_layout("src", sorted(entries), LabelRequest()):
        if image.class_name not in result.setdefault(image.split, []):
            result[image.split].append(image.class_name)
    return result


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAINING", "Validation", "TESTING"),
        ("training", "dev", "eval"),
        ("train_set", "val-set", "Test Set"),
        ("meta-train", "meta_val", "metatest"),
        ("x/y/Train", "x/y/Dev", "x/y/Evaluation"),
    ],
)
def test_the_usual_names_are_splits(train, validation, test):
    folders = (f"{train}/a", f"{train}/b", f"{validation}/c", f"{validation}/d", f"{test}/e", f"{test}/f")
    assert splits(*folders) == {"test": ["e", "f"], "train": ["a", "b"], "validation": ["c", "d"]}


def test_a_part_of_the_splits_is_read_as_such():
    assert splits("Train/a", "Train/b", "Test") == {"test": [""], "train": ["a", "b"]}
    assert splits("val/a", "val/b", "test/c", "test/d") == {"test": ["c", "d"], "validation": ["a", "b"]}
    assert splits("Testing/a", "Testing/b") == {"test": ["a", "b"]}
    assert splits("train/train/a", "train/train/b") == {"train": ["train/a", "train/b"]}
    assert splits("train/train/a", "train/train/b", "test/test/c", "test/test/d") == {
        "train": ["train/a", "train/b"],
        "test": ["test/c", "test/d"],
    }


def test_class_folders_stay_classes():
    assert splits("plane", "train", "bus") == {"train": ["bus", "plane", "train"]}
    assert splits("vehicles/train", "vehicles/bus", "animals/cat") == {
        "train": ["animals/cat", "vehicles/bus", "vehicles/train"]
    }
    assert splits("bullet_train", "pregnancy test") == {"train": ["bullet_train", "pregnancy test"]}
    assert splits("latest", "trained", "evaluator") == {"train": ["evaluator", "latest", "trained"]}
    assert splits("train/bus", "train/train", "test/plane", "test/ship") == {
        "train": ["bus", "train"],
        "test": ["plane", "ship"],
    }


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("Train/a", "Train/b", "train/c", "train/d"), "folders Train and train both stand for train"),
        (("train/a", "val/b", "valid/c"), "folders val and valid both stand for validation"),
        (("train/a", "test/b", "eval/c"), "folders eval and test both stand for test"),
        (("train/a", "test/b", "pred"), "test, train beside pred: these folders can be splits or classes"),
        (("train/a", "train/b", "extra/c"), "train beside extra"),
        (("train", "test", "."), "test, train"),
        (("cat", "dog", "test"), "test beside cat, dog"),
        (("train", "test1"), "train beside test1"),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "cat/test, cat/train"),
        (("cat/train", "dog/train"), "cat/train"),
        (("images/train", "images/test", "masks/train", "masks/test"), "images/test, images/train"),
        (("set/train/a", "set/test/b", "preview"), "set/test, set/train"),
        (("seg_train/seg_train/a", "seg_test/seg_test/a", "seg_pred"), "seg_pred, seg_test, seg_train"),
        (("train2017", "val2017"), "train2017, val2017"),
        (("trainImages/a", "testImages/a"), "testImages, trainImages"),
        (("train/a/test", "train/b", "test/c"), "train/a/test"),
        (("train/test/a", "train/test/b"), "has the names of two splits"),
        (("Train/a", "Train/b", "Test/a", "Test/c"), "test/a and train/a are classes with the same name"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(folders, words):
    with pytest.raises(DataError) as caught:
        splits(*folders)
    assert str(caught.value).startswith("src: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
