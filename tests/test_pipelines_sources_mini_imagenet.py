"""Mini-ImageNet: every layout gives the same images, splits and classes; unsafe cache files are refused."""

from __future__ import annotations

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
    pixels,
    png,
    put,
    shrink,
    tarred,
    zipped,
)

from metagmvae.pipelines.sources.mini_imagenet import open_mini_imagenet
from metagmvae.pipelines.sources.source import open_source


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def archive_per_split(root: Path, suffix: str) -> Path:
    loose = by_folders(root / "loose") / "mini"
    for split in SPLITS:
        (zipped if suffix == "zip" else tarred)(loose / split, root / f"{split}.{suffix}")
    shutil.rmtree(root / "loose")
    return root


def images_zip(root: Path) -> Path:
    by_lists(root)
    zipped(root / "images", root / "images.zip")
    shutil.rmtree(root / "images")
    return root


LAYOUTS = {
    "lists": by_lists,
    "folders": by_folders,
    "lists, zipped": lambda root: zipped(by_lists(root), root.with_suffix(".zip")),
    "lists, tar": lambda root: tarred(by_lists(root), root.with_suffix(".tar")),
    "folders, zipped": lambda root: zipped(by_folders(root), root.with_suffix(".zip")),
    "folders, tar.gz": lambda root: tarred(by_folders(root), root.with_suffix(".tar.gz")),
    "lists, images.zip": images_zip,
    "a zip for each split": lambda root: archive_per_split(root, "zip"),
    "a tar for each split": lambda root: archive_per_split(root, "tar"),
    "a tar.bz2 for each split": lambda root: archive_per_split(root, "tar.bz2"),
    "a tar.xz for each split": lambda root: archive_per_split(root, "tar.xz"),
    "caches": by_caches,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_and_classes(layout, tmp_path):
    source = open_source("mini-imagenet", str(LAYOUTS[layout](tmp_path / "data")), size=SIDE)
    assert source.image_shape == (3, SIDE, SIDE)
    assert list(source.splits) == ["train", "validation", "test"]
    assert source.report["missing"] == []
    for split, files in FILES.items():
        records = source.splits[OUR_NAMES[split]]
        assert sorted(r.class_name for r in records) == sorted(label for label, _ in files)
        block = source.load_block(OUR_NAMES[split], list(range(len(records))))
        wanted = {pixels(*file).transpose(2, 0, 1).tobytes(): file[0] for file in files}
        assert [wanted.pop(image.tobytes()) for image in block] == [r.class_name for r in records]
        assert not wanted


def test_the_same_files_have_the_same_fingerprint_in_any_layout(tmp_path):
    names = ("lists", "folders", "lists, zipped", "folders, tar.gz", "a zip for each split", "a tar.xz for each split")
    fingerprints = {
        name: open_mini_imagenet(str(LAYOUTS[name](tmp_path / str(i) / "data")), size=SIDE).fingerprint
        for i, name in enumerate(names)
        if not (tmp_path / str(i)).mkdir()
    }
    assert len(set(fingerprints.values())) == 1


def test_missing_images_are_reported_and_can_be_allowed(tmp_path):
    root = by_folders(tmp_path / "data")
    shutil.rmtree(root / "mini" / "val" / "n05")
    (root / "mini" / "train" / "n02" / "n0200000001.png").unlink()
    assert_refused(r"train has classes without exactly 4 images \(n02 3\); validation has 1 of 2 classes", root)
    source = open_mini_imagenet(str(root), size=SIDE, allow_missing=True)
    assert source.report["classes"] == {"train": 3, "validation": 1, "test": 2}
    assert len(source.report["missing"]) == 2


def test_wrong_input_gives_one_error_line(tmp_path):
    assert_refused("give your copy with --source", None)
    assert_refused("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert_refused("no Mini-ImageNet found; layouts", tmp_path / "empty")
    put(tmp_path / "odd" / "picture.png", png("n01", 0))
    assert_refused("picture.png is not in a folder of a class", tmp_path / "odd")
    root = by_lists(tmp_path / "lists")
    for number in range(2):
        (root / "images" / f"n01{number:08d}.png").unlink()
    assert_refused(r"2 files of train.csv are missing: n0100000000.png, n0100000001.png", root)
    put(root / "train.csv", b"filename,label\nx.png\n")
    assert_refused("train.csv line 2 is not filename,label", root)
    put(root / "train.csv", b"\xff\xfe")
    assert_refused("train.csv is not a csv file", root)
    root = by_folders(tmp_path / "twice")
    shutil.copytree(root / "mini" / "train" / "n01", root / "mini" / "val" / "n01")
    assert_refused("class n01 is in two splits", root, allow_missing=True)
    root = archive_per_split(tmp_path / "double", "zip")
    shutil.copy(root / "train.zip", root / "TRAIN.zip")
    assert_refused("two archives of train", root)


@pytest.mark.real_data
def test_the_real_files_are_complete_and_can_be_decoded(data_root, monkeypatch):
    monkeypatch.undo()
    source = open_source("mini-imagenet", str(data_root / "mini-imagenet"))
    assert {split: len(records) for split, records in source.splits.items()} == {
        "train": 38_400,
        "validation": 9_600,
        "test": 12_000,
    }
    assert source.report == {"classes": {"train": 64, "validation": 16, "test": 20}, "missing": []}
    block = source.load_block("test", [0, 6000, 11_999])
    assert block.shape == (3, 3, 84, 84)
    assert all(image.std() > 10 for image in block)
