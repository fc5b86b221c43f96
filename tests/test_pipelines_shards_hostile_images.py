"""Hostile and damaged shards of encoded images: one line that names shard and member, and no image in its place."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from photographs import file_content, picture, write_pictures
from PIL import JpegImagePlugin, WebPImagePlugin

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoded")
    pictures = str(write_pictures(root / "pictures"))
    source = open_source("folder", pictures, size=48, validation_classes=2, test_classes=2)
    write_dataset(source, root / "data", store="encoded", shard_rows=12)
    return root / "data"


@pytest.fixture
def data(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


def sign(data):
    """Write the sizes and sha256 of the files into the manifest, as an attacker would."""
    manifest = json.loads((data / "dataset.json").read_text())
    for split, part in manifest["splits"].items():
        part["index_sha256"] = hashlib.sha256((data / split / "index.parquet").read_bytes()).hexdigest()
        for shard in part["shards"]:
            content = (data / split / shard["name"]).read_bytes()
            shard |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (data / "dataset.json").write_text(json.dumps(manifest))


def huge(content: bytes) -> bytes:
    """The same JPEG file with 65,000 x 65,000 in its header."""
    frame = content.index(b"\xff\xc0") + 5
    return content[:frame] + (65_000).to_bytes(2, "big") * 2 + content[frame + 4 :]


JPEG_FILE = file_content(picture(1), "JPEG")
WEBP_FILE = file_content(picture(1), "WEBP", lossless=True)
SCAN = JPEG_FILE.index(b"\xff\xda")
UNKNOWN = "neither a JPEG nor a WebP file"
HOSTILE = {
    "truncated": (JPEG_FILE[:-40], "broken image (image file is truncated"),
    "half": (JPEG_FILE[: len(JPEG_FILE) // 2], "broken image ("),
    "no scan": (JPEG_FILE[:SCAN], "broken image"),
    "truncated WebP": (WEBP_FILE[:-1], "broken image"),
    "half a WebP": (WEBP_FILE[:1000], "broken image"),
    "bomb": (huge(JPEG_FILE), "the image has far more pixels than 48 x 48"),
    "WebP bomb": (WEBP_FILE[:21] + b"\xff\xff\xff\x0f" + WEBP_FILE[25:], "the image has far more pixels than 48 x 48"),
    "another size": (file_content(picture(1, 47, 48), "JPEG"), "the image is 47 x 48, not 48 x 48"),
    "another size of WebP": (file_content(picture(1, 48, 50), "WEBP"), "the image is 48 x 50, not 48 x 48"),
    "another format": (file_content(picture(1), "PNG"), UNKNOWN),
    "empty": (b"", UNKNOWN),
    "empty segments": (b"\xff\xd8" + bytes.fromhex("ffe00002") * 900, UNKNOWN),
    "noise": (bytes(3000), UNKNOWN),
}


def replace_member(path, number, content, name=None):
    """Replace the content (and name) of one member of a tar file."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    members[number] = (name or members[number][0], content)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_is_refused_by_every_reader_before_it_is_decoded(case, data, monkeypatch):
    content, reason = HOSTILE[case]
    replace_member(data / "train" / "shard-000001.tar", 4, content)
    sign(data)
    dataset = Dataset.open(data)
    for decoder in (JpegImagePlugin.JpegImageFile, WebPImagePlugin.WebPImageFile):
        load = decoder.load
        monkeypatch.setattr(decoder, "load", lambda image, load=load: load(image) if image.size == (48, 48) else 1 / 0)
    reads = {
        "memory": lambda: dataset.images("train", "memory"),
        "mmap": lambda: dataset.images("train", "mmap")[np.arange(12, 24)],
        "stream": lambda: list(zip(range(60), StreamedImages(dataset, "train", 4).rows(0, 0, 1, 0), strict=False)),
    }
    for read in reads.values():
        with pytest.raises(DataError, match=r"train/shard-000001\.tar: member shard-000001-000004: ") as caught:
            read()
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    (problem,) = verify_dataset(data)
    assert (problem.kind, problem.path) == ("inconsistent", "train/shard-000001.tar")
    assert reason in problem.detail


@pytest.mark.parametrize(
    "name", ["shard-000001-000005.jpg", "shard-000001-000004.png", "shard-000001-000004", "labels"]
)
def test_a_member_of_another_name_is_refused(name, data):
    replace_member(data / "train" / "shard-000001.tar", 4, JPEG_FILE, name)
    sign(data)
    with pytest.raises(DataError, match=rf"shard-000001\.tar: member '{name}' instead of shard-000001-000004\.\*"):
        Dataset.open(data).images("train", "mmap")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["store"].update(members="zipped"), "store.members"),
        (lambda m: m["store"].update(quality=101), "store.quality"),
        (lambda m: m["store"].pop("quality"), "store.quality"),
        (lambda m: m["splits"]["test"]["shards"][0].update(bytes=100), "too few for 12 rows"),
        (lambda m: m.pop("store"), "too few for"),
    ],
)
def test_a_manifest_that_contradicts_the_shards_is_refused(change, reason, data):
    manifest = json.loads((data / "dataset.json").read_text())
    change(manifest)
    (data / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=reason):
        Dataset.open(data).images("test")


def test_a_missing_member_is_refused(data):
    path = data / "test" / "shard-000001.tar"
    with tarfile.open(path) as tar:
        last = max(info.offset for info in tar)
    path.write_bytes(path.read_bytes()[:last] + bytes(1024))
    sign(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar: 11 rows, but 12 in the manifest"):
        Dataset.open(data).images("test", "mmap")


def test_verify_compares_the_index_with_the_shards(data):
    assert verify_dataset(data) == []
    shutil.copy(data / "validation" / "index.parquet", data / "test" / "index.parquet")
    sign(data)
    (problem,) = verify_dataset(data)
    assert (problem.kind, problem.path) == ("inconsistent", "test/index.parquet")
    assert "columns offset, size do not fit the shards" in problem.detail
