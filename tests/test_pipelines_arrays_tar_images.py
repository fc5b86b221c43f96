"""`prepare webdataset`: tar files that the library webdataset writes, their classes, and files that are wrong."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset import tariterators

from metagmvae.infra.cli import main
from metagmvae.pipelines.arrays.image_arrays import Columns
from metagmvae.pipelines.arrays.tar_images import read_tars
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.sources.source import ImageSource, open_source


def png(value: int) -> bytes:
    """An image of one grey value."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    """A tar file as the library writes it; keys of samples are suffixes."""
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": sample.pop("__key__", f"{path.stem}/{number:06d}"), **sample})
    return path


def sample(value: int, **more: bytes) -> dict[str, Any]:
    return {"png": png(value), "cls": str(value // 10).encode(), "json": b"{}", **more}


def content(source: ImageSource) -> list[tuple[int, str]]:
    """Grey value and class of each image, in the order of the rows."""
    records = sorted((record for rows in source.splits.values() for record in rows), key=lambda record: record.key)
    return [(int(record.load()[0, 0, 0]), record.class_name) for record in records]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four tar files of ten images; class 0 has 0 to 9, and so on."""
    for shard in range(4):
        write(tmp_path / "tars" / f"{shard}.tar", [sample(10 * shard + value) for value in range(10)])
    return tmp_path / "tars"


def test_samples_are_those_that_webdataset_reads(shards: Path) -> None:
    source = open_source("webdataset", str(shards), size=8)
    expected = []
    for path in sorted(shards.iterdir()):
        with open(path, "rb") as file:
            read = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            for each in tariterators.group_by_keys(read):
                expected.append((int(np.asarray(Image.open(io.BytesIO(each["png"])))[0, 0]), each["cls"].decode()))
    assert content(source) == expected == [(value, str(value // 10)) for value in range(40)]
    assert content(pickle.loads(pickle.dumps(source))) == expected
    assert source.files["files"] == {"seen": 5, "read": 4, "left_out": 1}
    (left_out,) = source.files["left_out"]
    assert (left_out["reason"], left_out["names"]) == ("not read", "40 files .json")
    assert {*open_source("webdataset", str(shards), size=8, classes=False).splits} == {"train"}


def test_prepare_writes_them_without_holding_them(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    words = ["prepare", "webdataset", "--source", str(shards), "--out", str(out), "--test-classes", "2"]
    assert main([*words, "--validation-classes", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == {"train": 20, "test": 20}
    dataset = Dataset.open(out)
    names = {int(name) for name in dataset.class_names("test")}
    assert {int(image[0, 0, 0]) // 10 for image in dataset.images("test")[:]} == names
    images = read_tars(str(shards), Columns(True, None, None, None)).images
    arrays = [value for value in vars(images).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 40 * (4 + 8 + 8)


def test_other_suffixes_and_groups(tmp_path: Path) -> None:
    samples = [
        {"png": png(value), "mask.png": png(99), "tiff": b"x", "breed.txt": f" breed {value % 2}\n".encode()}
        | {"patient": str(value // 4).encode()}
        for value in range(24)
    ]
    path = write(tmp_path / "a.tar", [{"__key__": f"x.y/{number}", **each} for number, each in enumerate(samples)])
    with pytest.raises(DataError, match=r"x\.y/0: has several images \(png, tiff\) among breed.txt, .*image=SUFFIX$"):
        open_source("webdataset", str(path))
    options = {"image": "mask.png", "label": "breed.txt", "size": 8}
    assert content(open_source("webdataset", str(path), **options)) == [(99, f"breed {v % 2}") for v in range(24)]
    fractions = (0.5, 0.0, 0.5)
    grouped = open_source("webdataset", str(path), **options, groups="patient", fractions=fractions)
    groups = {split: {record.group for record in records} for split, records in grouped.splits.items()}
    assert set.union(*groups.values()) == {str(number) for number in range(6)}
    assert not groups["train"] & groups["test"]
    no_class = open_source("webdataset", str(path), image="png", size=8)
    assert [label for _, label in content(no_class)] == [""] * 24


WRONG: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    r"holds no \.tar files; give the folder that does$": lambda path: (path / "a.txt").write_text("x") and None,
    r"a\.tar: is gz, not an uncompressed tar file; unpack it once$": lambda path: (
        (path / "a.tar").write_bytes(gzip.compress(write(path.parent / "other" / "a.tar", [sample(1)]).read_bytes()))
        and None
    ),
    r"holds no samples; give tar files of WebDataset$": lambda path: write(path / "a.tar", []) and None,
    r"a/000000: has no image among cls, json; name": lambda path: (
        write(path / "a.tar", [{"cls": b"1", "json": b""}]) and None
    ),
    r"has no image \.jpg among cls, json, png": lambda path: write(path / "a.tar", [sample(1)]) and {"image": "jpg"},
    r"1 of 2 samples have no \.cls; add it, name another suffix, or use --unlabelled$": lambda path: (
        write(path / "a.tar", [sample(1), {"png": png(2)}]) and None
    ),
    r"1 of 1 samples have no \.txt": lambda path: write(path / "a.tar", [sample(1)]) and {"label": "txt"},
    r"a/000000: its class or group is no line of text": lambda path: (
        write(path / "a.tar", [sample(1, cls=b"one\ntwo")]) and None
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_files_are_one_line(message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    options = WRONG[message](tmp_path / "in") or {}
    with pytest.raises(DataError, match=message) as caught:
        open_source("webdataset", str(tmp_path / "in"), **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tar_file_that_becomes_shorter_is_named(shards: Path) -> None:
    images = read_tars(str(shards), Columns(True, None, None, None)).images
    with open(shards / "0.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match=re.escape("0.tar: has become shorter since it was listed")):
        images[9]
