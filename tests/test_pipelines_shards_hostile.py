"""Altered and hostile files of a dataset are refused before they cost accuracy, memory or time."""

import io
import json
import os
import shutil
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metagmvae.pipelines import files
from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.blocks import shard_blocks
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.index import SCHEMA, read_index
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

SHARD = "train/shard-000001.tar"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "data"
    write_dataset(open_source("glyphs", classes=(6, 3, 3), drawings=10), folder, block=8, shard_rows=16)
    return folder


@pytest.fixture
def data(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


def edit(data, change):
    manifest = json.loads((data / "dataset.json").read_text())
    manifest.pop("preprocessing", None)
    change(manifest)
    (data / "dataset.json").write_text(json.dumps(manifest))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_an_altered_index_is_refused_when_it_is_read(data):
    path = data / "test" / "index.parquet"
    table = pq.read_table(path)
    shuffled = table.set_column(5, SCHEMA.field("class_id"), pa.array(table["class_id"].to_pylist()[::-1], pa.int32()))
    pq.write_table(shuffled, path)
    dataset = Dataset.open(data)
    for read in (dataset.labels, dataset.class_names, dataset.index):
        with pytest.raises(DataError, match=r"test/index\.parquet: index was altered after writing"):
            read("test")


@pytest.mark.parametrize("position", [600, 2000])
def test_an_altered_shard_is_refused_by_every_reader(data, position):
    flip(data / SHARD, position)
    dataset = Dataset.open(data)
    for reader in ("memory", "mmap"):
        with pytest.raises(DataError, match=r"shard-000001\.tar: shard was altered after writing"):
            dataset.rows("train", reader)
    rows = StreamedImages(dataset, "train", 4).rows(0, 0, 1, 0)
    with pytest.raises(DataError, match=r"shard-000001\.tar: shard was altered after writing"):
        list(zip(range(60), rows, strict=False))


def test_files_are_compared_once_per_process_unless_they_change(data, monkeypatch):
    monkeypatch.setattr(files, "RECENT_NS", 0)
    read = []
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    for _ in range(3):
        Dataset.open(data).rows("train", "mmap")
        Dataset.open(data).labels("train")
    assert len(read) == len(set(read)) == len(list((data / "train").iterdir()))
    flip(data / SHARD, 600)
    with pytest.raises(DataError, match="altered"):
        Dataset.open(data).rows("train", "mmap")


def test_a_file_that_has_just_changed_is_compared_again(tmp_path):
    """Its time stamp may not distinguish it from the next change."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    status = path.stat()
    first = files.sha256_once(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files.sha256_once(path) == sha256_file(path) != first


def shard(*members):
    """A tar file of (name, content, changes of its header)."""
    buffer = io.BytesIO()
    for name, content, changes in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in changes.items():
            setattr(info, key, value)
        buffer.write(info.tobuf(tarfile.GNU_FORMAT))
        buffer.write(content + bytes(-len(content) % 512))
    return io.BytesIO(buffer.getvalue() + bytes(1024))


def npy(header, content=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


HEADER = "{{'descr': '{}', 'fortran_order': {}, 'shape': {}, }}"


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ((npy(HEADER.format("|u1", False, (10**12, 28)), bytes(9000)), {}), "states 1,000,000,000,000 rows"),
        ((npy(HEADER.format("|u1", False, (-4, 28)), bytes(112)), {}), "not a C-ordered array"),
        ((npy(HEADER.format("|u1", False, ()), bytes(1)), {}), "not a C-ordered array"),
        ((npy(HEADER.format("|u1", True, (4, 28)), bytes(112)), {}), "not a C-ordered array"),
        ((npy(HEADER.format("|O", False, (4,)), bytes(32)), {}), "not a C-ordered array"),
        ((npy("(" * 100), {}), "not a NumPy array"),
        ((npy("9" * 100), {}), "not a NumPy array"),
        ((b"\x93NUMPY\x02\x00" + bytes(200), {}), "NumPy array of format"),
        ((b"", {}), "not a NumPy array"),
        ((b"x" * 600, {"size": -512}), "states -512 bytes"),
        ((b"x" * 600, {"size": 10**12}), "states 1,000,000,000,000 bytes, more than there are"),
        ((b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "is not a file"),
        ((b"", {"type": tarfile.LNKTYPE, "linkname": "a"}), "is not a file"),
        ((b"", {"type": tarfile.DIRTYPE}), "is not a file"),
        ((b"", {"type": tarfile.GNUTYPE_SPARSE}), "is not a file"),
    ],
)
def test_sizes_in_a_shard_are_compared_with_its_bytes(member, reason):
    content, changes = member
    tracemalloc.start()
    with pytest.raises(DataError, match=reason) as caught:
        shard_blocks(shard(("a.x.npy", content, changes)), "shard-000000.tar")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20
    assert "\n" not in str(caught.value)


def test_an_index_of_many_equal_rows_is_refused_by_its_stated_size(tmp_path):
    path = tmp_path / "index.parquet"
    count = 2_000_000
    number, text = pa.array(np.zeros(count, np.int64)), pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["a"])
    columns = {f.name: number.cast(f.type) if pa.types.is_integer(f.type) else text.cast(f.type) for f in SCHEMA}
    pq.write_table(pa.table(columns, schema=SCHEMA), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="index of 2,000,000 rows, but 60 in the manifest"):
        read_index(path, rows=60, classes=6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["splits"]["train"].update(samples=10**12), "splits.train.samples is 1,000,000,000,000"),
        (lambda m: m["splits"]["train"]["shards"][0].update(rows=10**12), "splits.train.samples is 60"),
        (lambda m: m.update(image_shape=[1, 2**20, 2**20]), "more than 268,435,456 values"),
        (lambda m: m.update(image_shape=[1, 280, 280]), "too few for"),
        (lambda m: m.update(image_shape=[1, 10**30, 1]), "image_shape.1"),
        (lambda m: m["splits"]["train"].update(classes=61), "classes is 61 for 60 samples"),
        (lambda m: m["splits"]["train"]["shards"].reverse(), "not in the order of their names"),
        (lambda m: m.pop("name"), "name is missing"),
        (lambda m: m.pop("source_fingerprint"), "source_fingerprint is missing"),
        (lambda m: m.pop("splits"), "splits is missing"),
        (lambda m: m.update(kind="features", dtype="float16", feature_size=4), "encoder is missing"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(data, change, reason):
    edit(data, change)
    for read in (Dataset.open, verify_dataset):
        with pytest.raises(DataError, match=reason):
            read(data)


def test_verify_names_what_the_readers_cannot_open(data):
    edit(data, lambda m: m.update(image_shape=[1, 14, 56]))
    found = {(problem.kind, problem.path) for problem in verify_dataset(data)}
    assert found == {("inconsistent", f"{split}/shard-000000.tar") for split in ("train", "validation", "test")}


def test_verify_names_links_and_files_that_are_too_long(data, tmp_path):
    elsewhere = tmp_path / "elsewhere.tar"
    shutil.move(data / SHARD, elsewhere)
    (data / SHARD).symlink_to(elsewhere)
    with open(data / "train" / "shard-000000.tar", "ab") as file:
        file.write(b"x")
    shutil.move(data / "test", tmp_path / "test")
    (data / "test").symlink_to(tmp_path / "test")
    found = {(problem.kind, problem.path): problem.detail for problem in verify_dataset(data)}
    assert f"shard-000001.tar is a link to {elsewhere}" in found["link", SHARD]
    assert found["altered", "train/shard-000000.tar"].startswith("20481 bytes instead of 20480")
    assert ("link", "test/index.parquet") in found


def read_all(data):
    dataset = Dataset.open(data)
    dataset.labels("test")
    dataset.rows("train")


@pytest.mark.parametrize("name", ["dataset.json", "test/index.parquet", SHARD])
def test_a_file_that_cannot_be_read_is_not_called_damaged(data, monkeypatch, name):
    def refuse(path, *arguments):
        if str(path) == str(data / name):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments)

    original = open
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(DataError, match=f"{name}: cannot be read \\(Permission denied\\)"):
        read_all(data)


def test_a_pipe_in_place_of_a_file_does_not_block(data):
    (data / SHARD).unlink()
    os.mkfifo(data / SHARD)
    edit(data, lambda m: m["splits"]["train"]["shards"][1].update(bytes=0, rows=0))
    edit(data, lambda m: m["splits"]["train"].update(samples=44))
    with pytest.raises(DataError, match="not a regular file"):
        Dataset.open(data).rows("train")
