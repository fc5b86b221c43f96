"""`bench loader` on photographs: all forms hold the same pictures, and each reader reads all of them."""

import tarfile

import numpy as np
import pytest
from photographs import SIDE, picture
from PIL import Image

from metagmvae.evaluation.bench import loader_speed
from metagmvae.evaluation.bench.loader_speed import bench_loader
from metagmvae.evaluation.bench.picture_copies import copy_pictures
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

COUNT = 16


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Datasets of the same JPEG files by store."""
    root = tmp_path_factory.mktemp("jpeg")
    for number in range(COUNT):
        (root / "files" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        picture(number).save(root / "files" / f"class{number % 2}" / f"{number}.jpg")
    source = open_source("folder", str(root / "files"), size=SIDE, validation_classes=0)
    for store in ("decoded", "encoded"):
        write_dataset(source, root / store, store=store)
    return {store: Dataset.open(root / store) for store in ("decoded", "encoded")}


@pytest.mark.parametrize(("store", "suffix"), [("decoded", ".png"), ("encoded", ".jpg")])
def test_all_forms_hold_the_same_pictures(store, suffix, stores, tmp_path):
    dataset = stores[store]
    copies = copy_pictures(dataset, "train", tmp_path, COUNT)
    files = {path.stem: path for path in copies.files.rglob("*.*")}
    assert {path.suffix for path in files.values()} == {suffix}
    images = dataset.images("train")
    for form in (copies.decoded, copies.encoded):
        stored = form.images("train")
        for image, row in zip(stored, form.index("train").to_pylist(), strict=True):
            label, number = row["key"].split("/")
            np.testing.assert_array_equal(image, images[int(number)])
            np.testing.assert_array_equal(np.asarray(Image.open(files[number])).transpose(2, 0, 1), image)
            assert dataset.labels("train")[int(number)] == int(label) == int(files[number].parent.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset does not close its files
def test_photographs_are_read_from_every_form(stores, monkeypatch):
    small = {"BATCH": 2, "SET_SIZE": 8, "STEPS": 2, "ENCODED_STEPS": 2, "PHOTOGRAPH_STEPS": 1, "LOADER_WORKERS": 0}
    for name, value in small.items():
        monkeypatch.setattr(loader_speed, name, value)

    def count_members(shards):
        members = 0
        for path in shards:
            with tarfile.open(path) as shard:
                members += len(shard.getnames())
        assert members == COUNT
        return members

    answer = bench_loader(stores["encoded"], "train", COUNT, 1, count_members)
    rows = {row["reader"]: row for row in answer["rows"]}
    assert {name for name in rows if "encoded" in name} == {
        "encoded shards, decoded in each step",
        "opening and decoding encoded shards, warm",
        "opening and decoding encoded shards, cold",
        "encoded shards by webdataset.WebLoader",
        "encoded shards by Ray Data, read_webdataset",
    }
    assert len(rows) == 11
    assert all(row["samples_per_s"] > 0 for row in rows.values())
    without_time = {name for name, row in rows.items() if not row.get("samples_per_cpu_s", 0) > 0}
    assert without_time == {"encoded shards by Ray Data, read_webdataset"}
    sizes = [rows[name]["bytes_per_image"] for name in ("shards in memory", "encoded shards by webdataset.WebLoader")]
    assert sizes[0] > SIDE * SIDE * 3 > sizes[1] > 0
    assert set(answer["waiting_share_in_training"]) == {"memory", "mmap", "encoded"}
    # Ray Data decodes no WebP.
    answer = bench_loader(stores["decoded"], "train", COUNT, 1, count_members)
    assert len(answer["rows"]) == 10
