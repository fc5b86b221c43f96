"""Mini-ImageNet: other spellings of lists and caches are read; two files for the same thing are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from mini_imagenet_files import (
    FILES,
    OUR_NAMES,
    SIDE,
    SPLITS,
    assert_refused,
    by_caches,
    by_folders,
    by_lists,
    png,
    put,
    shrink,
    tarred,
    zipped,
)

from metagmvae.pipelines.sources.mini_imagenet import open_mini_imagenet


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def move_lists(root: Path, folder: str) -> None:
    for split in SPLITS:
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.move(root / f"{split}.csv", root / folder / f"{split}.csv")


def test_two_lists_of_a_split_are_refused(tmp_path):
    root = by_lists(tmp_path / "data")
    move_lists(root, "splits/ravi")
    assert open_mini_imagenet(str(root), size=SIDE).report["missing"] == []
    shutil.copytree(root / "splits" / "ravi", root / "splits" / "vinyals")
    assert_refused("two lists of train, splits/ravi/train.csv and splits/vinyals/train.csv; remove one", root)
    assert_refused("two lists of train", zipped(root, tmp_path / "data.zip"), allow_missing=True)


def test_images_that_are_there_twice_are_refused(tmp_path):
    root = by_lists(tmp_path / "data")
    shutil.copytree(root / "images", root / "images_full")
    assert_refused("is there twice, .*/images/n0100000000.png and .*/images_full/n0100000000.png; remove one", root)
    root = by_folders(tmp_path / "folders")
    zipped(root / "mini" / "train", root / "train.zip")
    assert_refused("an image is there twice, .*/train.zip/n01/.* and .*/mini/train/n01/.*; remove one", root)
    root = by_caches(tmp_path / "caches")
    shutil.copy(root / "mini-imagenet-cache-val.pkl", root / "mini-imagenet-cache-validation.pkl")
    assert_refused("two caches of validation, mini-imagenet-cache-val.pkl and mini-imagenet-cache-validation", root)


def test_a_list_that_contradicts_the_folders_is_refused(tmp_path):
    root = by_folders(tmp_path / "data")
    rows = "".join(f"{label}{n:08d}.png,{label}\n" for label, n in FILES["test"])
    put(root / "train.csv", f"filename,label\n{rows}".encode())
    assert_refused(r"train.csv names mini/test/n06/n0600000000.png, which is in a folder of test", root)
    rows = "".join(f"other-{label}{n:08d}.png,{label}\n" for label, n in FILES["train"])
    put(root / "train.csv", f"filename,label\n{rows}".encode())
    assert_refused("12 files of train.csv are missing: .* names such as mini/test/n06/.*; .* remove the lists", root)
    put(root / "mini" / "train" / "test" / "n01" / "x.png", png("n01", 9))
    (root / "train.csv").unlink()
    assert_refused("is in folders of two splits", root)


def rewrite_lists(root: Path, change) -> Path:
    for split in SPLITS:
        path = root / f"{split}.csv"
        path.write_text(change(path.read_text()))
    return root


SPELLINGS = {
    "folders in the names": lambda text: re.sub(r"(?m)^(n\d\d)", r"images/\1", text),
    "folders that are not there": lambda text: re.sub(r"(?m)^(n\d\d)", r"\1/\1", text),
    "folders of Windows": lambda text: re.sub(r"(?m)^(n\d\d)", r"data\\images\\\1", text),
    "capitals": lambda text: text.replace("filename,label", "Filename,Label"),
    "further columns and spaces": lambda text: text.replace("filename,label", " id , filename, label").replace(
        "\nn", "\n7, n"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_lists_are_read_in_other_spellings(tmp_path, spelling):
    wanted = open_mini_imagenet(str(by_lists(tmp_path / "plain")), size=SIDE).fingerprint
    root = rewrite_lists(by_lists(tmp_path / "data"), SPELLINGS[spelling])
    for split in SPLITS:
        (root / f"{split}.csv").rename(root / f"{split.upper()}.CSV")
    assert open_mini_imagenet(str(root), size=SIDE).fingerprint == wanted


def test_a_wrong_heading_is_named(tmp_path):
    root = rewrite_lists(by_lists(tmp_path / "data"), lambda text: text.replace("filename", "name"))
    assert_refused("train.csv line 1 is not filename,label", root)


def test_files_that_are_not_used_are_counted(tmp_path):
    root = by_lists(tmp_path / "data")
    put(root / "images" / "n9900000000.png", png("n01", 9))
    put(root / "README.txt", b"x")
    put(root / "labels.csv", b"x")
    files = open_mini_imagenet(str(root), size=SIDE).files
    assert files["files"] == {"seen": 28 + 3, "read": 28, "left_out": 3}
    assert [row["reason"] for row in files["left_out"]] == ["in no list of a split", "suffix .csv", "suffix .txt"]
    caches = by_caches(tmp_path / "caches")
    put(caches / "images" / "n9900000000.png", png("n01", 9))
    files = open_mini_imagenet(str(caches), size=SIDE).files
    assert files["left_out"] == [
        {"reason": "not needed beside the caches", "files": 1, "names": "images/n9900000000.png"}
    ]


def test_an_archive_of_caches_is_named(tmp_path):
    path = tarred(by_caches(tmp_path / "caches"), tmp_path / "mini.tar.gz")
    assert_refused("it contains mini-imagenet-cache-test.pkl, .*: unpack it and give the folder", path)


@pytest.mark.parametrize("spelling", ["mini-imagenet-cache-{}.pkl", "sub/folder/Mini-ImageNet-cache-{}.pickle"])
def test_caches_are_found_by_other_names(tmp_path, spelling):
    root = by_caches(tmp_path / "data")
    wanted = open_mini_imagenet(str(root), size=SIDE).fingerprint
    for split in SPLITS:
        path = root / spelling.format(OUR_NAMES[split])
        path.parent.mkdir(parents=True, exist_ok=True)
        (root / f"mini-imagenet-cache-{split}.pkl").rename(path)
    assert open_mini_imagenet(str(root), size=SIDE).fingerprint == wanted
