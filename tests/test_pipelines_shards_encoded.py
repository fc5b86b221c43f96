"""Datasets whose shards hold encoded images (`prepare --store encoded`)."""

import io
import json

import numpy as np
import pytest
import webdataset as wds
from folder_contents import contents
from photographs import KEPT, SIDE, file_content, picture, write_pictures
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.encoded import EncodedRows
from metagmvae.pipelines.shards.image_codec import decode_member, encode_member
from metagmvae.pipelines.shards.verify import verify_dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

ENCODED = {"store": "encoded", "shard_rows": 20}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def source(pictures):
    return open_source("folder", str(pictures), size=SIDE, validation_classes=2, test_classes=2)


@pytest.fixture(scope="module")
def decoded(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded") / "data"
    write_dataset(source, folder, shard_rows=20)
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def lossless(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lossless") / "data"
    write_dataset(source, folder, **ENCODED)
    return Dataset.open(folder)


def test_without_loss_all_readers_give_the_pixels_of_the_decoded_store(decoded, lossless):
    assert lossless.manifest["source_fingerprint"] == decoded.manifest["source_fingerprint"]
    assert lossless.preprocessing == decoded.preprocessing
    assert lossless.fingerprint != decoded.fingerprint
    for split in decoded.splits:
        expected = decoded.images(split)
        for reader in ("auto", "memory", "mmap"):
            np.testing.assert_array_equal(lossless.images(split, reader)[:], expected)
        assert isinstance(lossless.images(split, "mmap"), EncodedRows)
        assert lossless.index(split)["key"] == decoded.index(split)["key"]
        assert lossless.index(split)["class_id"] == decoded.index(split)["class_id"]
    streams = [StreamedImages(dataset, "train", 8).rows(3, 0, 1, 5) for dataset in (decoded, lossless)]
    for _, one, other in zip(range(100), *streams, strict=False):
        np.testing.assert_array_equal(one, other)


def test_files_stay_as_they_were_read_where_that_gives_the_same_pixels(pictures, lossless):
    kept, again = set(), set()
    for split in lossless.splits:
        for row in lossless.index(split).to_pylist():
            shard = (lossless.root / split / row["shard"]).read_bytes()
            content = shard[row["offset"] : row["offset"] + row["size"]]
            name = row["key"].rpartition("/")[2]
            (kept if content == (pictures / row["key"]).read_bytes() else again).add(name)
    assert kept == KEPT
    assert again == {"again.png", "turned.jpg", "commented.jpg", "larger.jpg"}
    assert lossless.manifest["splits"]["test"]["formats"] == {"jpg": 14, "webp": 10}


def test_rows_are_selected_as_in_an_array(lossless):
    rows, array = lossless.images("train", "mmap"), lossless.images("train", "memory")
    assert (len(rows), rows.shape, rows.dtype) == (len(array), array.shape, array.dtype)
    chosen = [3, -1, slice(2, 40, 3), [5, 0, 5], np.array([], int), [], np.arange(len(array)) % 3 == 0, np.int64(7)]
    for selection in chosen:
        np.testing.assert_array_equal(rows[selection], array[selection])
    for beyond in (len(array), -len(array) - 1, [0, len(array)]):
        with pytest.raises(IndexError):
            rows[beyond]
    assert sum(1 for _ in rows) == len(array)


def test_rows_do_not_depend_on_the_number_of_threads(lossless, monkeypatch):
    from metagmvae.pipelines.shards import encoded

    rows = lossless.images("train", "mmap")
    encoded._threads.cache_clear()
    monkeypatch.setattr(encoded, "_processors", lambda: 3)
    several = rows[:]
    monkeypatch.setattr(encoded, "LEAST_ROWS", 10**6)
    np.testing.assert_array_equal(rows[:], several)
    encoded._threads.cache_clear()


def test_loss_is_recorded_and_files_still_stay(source, decoded, tmp_path, capsys):
    manifest = write_dataset(source, tmp_path / "data", **ENCODED, quality=80)
    assert manifest["store"] == {"members": "encoded", "quality": 80}
    assert manifest["settings"]["quality"] == 80
    assert manifest["splits"]["test"]["formats"] == {"jpg": 14, "lossy.jpg": 8, "webp": 2}
    lossy, exact = Dataset.open(tmp_path / "data").images("test"), decoded.images("test")
    difference = np.abs(lossy.astype(int) - exact).reshape(len(exact), -1)
    assert (difference.max(1) == 0).sum() == 16
    assert 0 < difference.mean() < 4


def test_bytes_do_not_depend_on_task_order_or_interruption(source, lossless, tmp_path):
    def interrupt(function, tasks):
        yield function(*tasks[1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, tmp_path / "data", **ENCODED, map_tasks=interrupt)
    for other in ({}, {"store": "encoded", "shard_rows": 20, "quality": 90}):
        with pytest.raises(DataError, match="unfinished dataset with other settings"):
            write_dataset(source, tmp_path / "data", **other)
    write_dataset(source, tmp_path / "data", **ENCODED, map_tasks=lambda f, tasks: [f(*t) for t in reversed(tasks)])
    assert contents(tmp_path / "data") == contents(lossless.root)
    with pytest.raises(DataError, match="contains another dataset"):
        write_dataset(source, tmp_path / "data", shard_rows=20)


def test_the_manifest_of_a_decoded_dataset_is_as_before(decoded):
    assert set(decoded.manifest["settings"]) == {"seed", "block", "shard_rows"}
    assert "store" not in decoded.manifest
    assert set(decoded.manifest["splits"]["train"]) == {"samples", "classes", "index_sha256", "shards"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset does not close its files
def test_plain_webdataset_reads_the_shards(lossless):
    shards = [str(path) for path in sorted((lossless.root / "train").glob("*.tar"))]
    read = wds.WebDataset(shards, shardshuffle=False).decode("torchrgb").to_tuple("jpg;webp")
    loader = wds.WebLoader(read, batch_size=None, num_workers=0)
    images = np.stack([image.numpy() for (image,) in loader])
    np.testing.assert_array_equal(np.rint(images * 255).astype(np.uint8), lossless.images("train"))


def test_verify_finds_no_problem(lossless):
    assert verify_dataset(lossless.root) == []


def test_grey_images_are_decoded_exactly():
    grey = np.asarray(picture(3, 64, 64).convert("L"))[None]
    for original in (None, file_content(Image.fromarray(grey[0]), "JPEG", quality=100)):
        suffix, content = encode_member(grey, original, "lossless")
        np.testing.assert_array_equal(decode_member(content, grey.shape), grey)
        assert suffix == ".webp"
    jpeg = file_content(Image.fromarray(grey[0]), "JPEG")
    kept = np.asarray(Image.open(io.BytesIO(jpeg)))[None]
    assert encode_member(kept, jpeg, "lossless") == (".jpg", jpeg)


def test_prepare_reports_what_it_encodes(pictures, tmp_path, capsys):
    words = ["prepare", "folder", "--source", str(pictures), "--size", str(SIDE), "--store", "encoded", "--json"]
    assert main([*words, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "lossless")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["store"] == "encoded"
    assert answer["formats"] == {"jpg": 42, "webp": 30}
    assert answer["loss"].startswith("none")
    assert answer["bytes"]["pixels"] == 72 * SIDE * SIDE * 3
    assert answer["bytes"]["shards"] == sum(p.stat().st_size for p in (tmp_path / "lossless").rglob("*.tar"))
    assert main([*words, "--quality", "75", "--out", str(tmp_path / "lossy")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["loss"] == "24 of 72 images were encoded again with loss (JPEG of quality 75)"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["glyphs", "--store", "encoded"], "encoding saves nothing on images of 1 x 28 x 28 (784 bytes); use --store"),
        (["folder", "--quality", "90"], "--quality 90 has no effect on pixels; give --store encoded with it"),
        (["folder", "--store", "encoded", "--quality", "0"], "--quality is '0'; give lossless, or a whole number from"),
        (["folder", "--store", "encoded", "--quality", "best"], "--quality is 'best'"),
    ],
)
def test_wrong_requests(words, reason, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "folder", "--out", str(tmp_path / "out"), "--store", "zipped"])
    assert "invalid choice: 'zipped'" in capsys.readouterr().err
    source = ["--source", str(pictures)] if words[0] == "folder" else []
    assert main(["prepare", *words, *source, "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
