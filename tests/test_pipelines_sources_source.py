"""Opening sources by name, decoding blocks, pickling, fingerprints."""

import json
import pickle

import numpy as np
import pytest

from metagmvae.pipelines.archives.reader import Entry
from metagmvae.pipelines.files import write_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import OPENERS, check_integer, open_source, source_fingerprint


def test_unknown_names_and_options_are_refused(tmp_path):
    with pytest.raises(DataError, match=f"is a path, not a kind of source; .*: folder --source {tmp_path}$"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="unknown source 'omniglott'; did you mean 'omniglot'"):
        open_source("omniglott")
    with pytest.raises(DataError, match="'glyphs' has no option 'size'; choose from classes, drawings, seed"):
        open_source("glyphs", size=3)


def test_every_name_has_a_module():
    for name in OPENERS:
        with pytest.raises(DataError):
            open_source(name, "/dev/null/nothing")


def test_a_block_contains_its_records_and_a_pickled_source_gives_the_same():
    source = open_source("glyphs", classes=(3, 1, 1), drawings=4)
    block = source.load_block("train", [7, 0, 7])
    records = source.splits["train"]
    assert np.array_equal(block, np.stack([records[row].load() for row in (7, 0, 7)]))
    assert np.array_equal(pickle.loads(pickle.dumps(source)).load_block("train", [7, 0, 7]), block)
    assert source.load_block("train", []).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", True, None])
def test_check_integer_refuses_other_values(value):
    with pytest.raises(DataError, match=r"size is .*; give an integer of at least 1"):
        check_integer("size", value, 1)


def test_the_fingerprint_depends_on_content_and_options():
    entry = Entry("a.png", 7, 9)
    first = source_fingerprint("folder", [("train", entry)], {"size": 28})
    assert first == source_fingerprint("folder", [("train", Entry("a.png", 7, 9))], {"size": 28})
    others = {
        source_fingerprint("folder", [("test", entry)], {"size": 28}),
        source_fingerprint("folder", [("train", Entry("b.png", 7, 9))], {"size": 28}),
        source_fingerprint("folder", [("train", Entry("a.png", 8, 9))], {"size": 28}),
        source_fingerprint("folder", [("train", Entry("a.png", 7, 8))], {"size": 28}),
        source_fingerprint("folder", [("train", entry)], {"size": 32}),
        source_fingerprint("omniglot", [("train", entry)], {"size": 28}),
    }
    assert len(others | {first}) == 7


def test_manifest_records_the_preprocessing(tmp_path):
    source = open_source("glyphs", classes=(2, 1, 1), drawings=2)
    write_dataset(source, tmp_path / "data")
    expected = {"invert": False, "channels": 1, "size": [28, 28], "resample": "lanczos", "crop": "center square"}
    expected["sixteen_bit_white"] = 65535
    assert json.loads((tmp_path / "data/dataset.json").read_text())["preprocessing"] == expected
    assert Dataset.open(tmp_path / "data").preprocessing == source.preprocessing


def test_manifest_of_an_older_version_is_read_and_completed(tmp_path):
    source = open_source("glyphs", classes=(2, 1, 1), drawings=2)
    write_dataset(source, tmp_path / "data")
    new = (tmp_path / "data/dataset.json").read_bytes()
    fingerprint = Dataset.open(tmp_path / "data").fingerprint
    manifest = json.loads(new)
    del manifest["preprocessing"], manifest["options"]
    write_json(tmp_path / "data/dataset.json", manifest)
    old = Dataset.open(tmp_path / "data")
    assert old.preprocessing is None
    assert old.fingerprint == fingerprint
    write_dataset(source, tmp_path / "data")
    assert (tmp_path / "data/dataset.json").read_bytes() == new


@pytest.mark.parametrize(
    "change",
    [{"invert": 1}, {"channels": 3}, {"size": [28, 27]}, {"size": 28}, {"blur": 2}, {"resample": "nearest"}],
)
def test_preprocessing_that_cannot_be_applied_is_refused(tmp_path, change):
    write_dataset(open_source("glyphs", classes=(2, 1, 1), drawings=2), tmp_path / "data")
    manifest = json.loads((tmp_path / "data/dataset.json").read_text())
    manifest["preprocessing"].update(change)
    write_json(tmp_path / "data/dataset.json", manifest)
    with pytest.raises(DataError, match="preprocessing"):
        Dataset.open(tmp_path / "data")


@pytest.mark.parametrize("name", ["folder", "omniglot", "mini-imagenet"])
def test_the_size_of_images_is_bounded(name):
    with pytest.raises(DataError, match="size is 1000000000; give an integer of at most 4096"):
        open_source(name, "/nowhere", size=10**9)
