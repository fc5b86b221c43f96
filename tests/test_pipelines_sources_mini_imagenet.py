"""Mini-ImageNet: every layout gives the same images, splits and classes; unsafe cache files are refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources import mini_imagenet
from metagmvae.pipelines.sources.mini_imagenet import open_mini_imagenet
from metagmvae.pipelines.sources.mini_imagenet_pickle import read_cache
from metagmvae.pipelines.sources.source import open_source

SPLITS = {"train": ("n01", "n02", "n03"), "val": ("n04", "n05"), "test": ("n06", "n07")}
OUR_NAMES = {"train": "train", "val": "validation", "test": "test"}
PER_CLASS = 4
SIDE = 10


def pixels(label: str, number: int) -> np.ndarray:
    return np.random.default_rng([int(label[1:]), number]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def png(label: str, number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(label, number)).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {split: [(label, n) for label in labels for n in range(PER_CLASS)] for split, labels in SPLITS.items()}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mini_imagenet, "CLASSES", {"train": 3, "validation": 2, "test": 2})
    monkeypatch.setattr(mini_imagenet, "IMAGES_PER_CLASS", PER_CLASS)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def by_lists(root: Path) -> Path:
    for split, files in FILES.items():
        for label, n in files:
            put(root / "images" / f"{label}{n:08d}.png", png(label, n))
        rows = "".join(f"{label}{n:08d}.png,{label}\n" for label, n in files)
        put(root / f"{split}.csv", f"filename,label\n{rows}".encode())
    return root


def by_folders(root: Path) -> Path:
    for split, files in FILES.items():
        for label, n in files:
            put(root / "mini" / split / label / f"{label}{n:08d}.png", png(label, n))
    return root


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, path: Path) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
        archive.add(folder, ".")
    return path


def archive_per_split(root: Path, suffix: str) -> Path:
    loose = by_folders(root / "loose") / "mini"
    for split in SPLITS:
        (zipped if suffix == "zip" else tarred)(loose / split, root / f"{split}.{suffix}")
    shutil.rmtree(root / "loose")
    return root


def by_caches(root: Path) -> Path:
    root.mkdir()
    for split, files in FILES.items():
        order = np.random.default_rng(0).permutation(len(files))
        images = np.stack([pixels(*files[row]) for row in order])
        classes = {label: [i for i, row in enumerate(order) if files[row][0] == label] for label in SPLITS[split]}
        content = pickle.dumps({"image_data": images, "class_dict": classes}, protocol=2)
        put(root / f"mini-imagenet-cache-{split}.pkl", content)
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


def assert_refused(text: str, source: Path | None, **options) -> None:
    with pytest.raises(DataError, match=text) as caught:
        open_mini_imagenet(None if source is None else str(source), size=SIDE, **options)
    assert "\n" not in str(caught.value)


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


# --- cache files ------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, ("touch {mark}",)), "system"),
        ((eval, ("open('{mark}', 'w')",)), "eval"),
        ((os.mkdir, ("{mark}",)), "mkdir"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_of_a_pickle_is_run(call, name, protocol, tmp_path):
    mark = tmp_path / "ran"
    function, (argument,) = call
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps(Hostile((function, (argument.format(mark=mark),))), protocol=protocol))
    with pytest.raises(DataError, match=rf"refused .*{name}, which is not allowed"):
        read_cache(str(path))
    assert not mark.exists()


def test_only_arrays_strings_and_numbers_are_read(tmp_path):
    path = tmp_path / "x.pkl"

    def error(content) -> str:
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
        read_cache.cache_clear()
        with pytest.raises(DataError) as caught:
            read_cache(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert "which is not allowed" in error(Path("x"))
    assert "arrays of type 'O8' are refused" in error({"image_data": np.array([object], dtype=object)})
    assert "image_data is not a uint8 array" in error({"image_data": images[0], "class_dict": {}})
    assert "image_data is not a uint8 array" in error([1, 2])
    assert "class_dict is not a dict" in error({"image_data": images, "class_dict": [1]})
    assert "rows of class n01 are not integers below 2" in error({"image_data": images, "class_dict": {"n01": [2]}})
    assert "is not a class name" in error({"image_data": images, "class_dict": {"../n01": [0]}})
    complete = pickle.dumps({"image_data": images, "class_dict": {"n01": [0, 1]}}, protocol=2)
    for length in range(0, len(complete), 7):
        error(complete[:length])
    assert "no such file" in error(b"").lower() or "refused or not readable" in error(b"")
    array, u1 = b"cnumpy.core.multiarray\n_reconstruct\n(tR", b"cnumpy\ndtype\n(S'u1'\ntR"
    states = {
        "an array without content": b"",
        "with a wrong type or content": b"(K\x01(K\x01K\x01K\x01K\x03tK\x05\x89U\x03xxxtb",
        "wrong type or content": b"(K\x01(K\x01K\x01K\x01K\x03t" + u1 + b"\x89K\x03tb",
        "ordinal not in range": b"(K\x01(K\x01K\x01K\x01K\x03t" + u1 + b"\x89X\x03\x00\x00\x00\xe4\xb8\xadtb",
        "of shape (-1, -2, 1, 3)": b"(K\x01(J\xff\xff\xff\xffJ\xfe\xff\xff\xffK\x01K\x03t" + u1 + b"\x89U\x06xxxxxxtb",
    }
    for text, state in states.items():
        message = error(b"\x80\x02}(U\nimage_data" + array + state + b"U\nclass_dict}u.")
        assert text in message
        assert message.startswith(f"{path}: image_data is ")
    # Hashing nested tuples has no bound of depth or time.
    deep = b")" + b"\x85" * 200_000
    wide = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(100))
    for key in (deep, wide):
        assert "a key has type tuple" in error(b"\x80\x02}" + key + b"K\x01s.")
        assert "a key has type tuple" in error(b"\x80\x02}(" + key + b"K\x01u.")
        assert "not allowed" in error(b"\x80\x02(" + key + b"K\x01d.")
        assert "not allowed" in error(b"\x80\x04(" + key + b"\x91.")
        assert "arrays of type no name" in error(b"\x80\x02cnumpy\ndtype\n(" + key + b"tR.")
    assert "state of something that is not an array" in error(b"\x80\x02c_codecs\nencode\n}U\x01aK\x01sb.")
    for lengths in (b"\xff" * 8, b"\xff" * 6 + b"\x00\x00"):
        assert "refused or not readable" in error(b"\x80\x04\x8e" + lengths + b".")


def test_a_wrong_shape_allocates_no_memory(tmp_path):
    path = tmp_path / "x.pkl"
    images = np.zeros((2, 4, 4, 3), np.uint8)
    content = pickle.dumps({"image_data": images, "class_dict": {"n01": [0]}}, protocol=2)
    assert content.count(b"K\x02K\x04K\x04K\x03t") == 1
    path.write_bytes(content.replace(b"K\x02K\x04K\x04K\x03t", b"J\xff\xff\xff\x7fK\x04K\x04K\x03t"))
    read_cache.cache_clear()
    with pytest.raises(DataError, match=r"an array of shape \(2147483647, 4, 4, 3\) with 96 bytes"):
        read_cache(str(path))


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
