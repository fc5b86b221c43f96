"""Opening sources by name, decoding blocks, pickling, fingerprints."""

import pickle

import numpy as np
import pytest

from metagmvae.pipelines.archives.reader import Entry
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sources.source import OPENERS, check_integer, open_source, source_fingerprint


def test_unknown_names_and_options_are_refused():
    with pytest.raises(
        DataError, match="unknown source 'omniglott'; choose one of folder, glyphs, mini-imagenet, omniglot"
    ):
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
