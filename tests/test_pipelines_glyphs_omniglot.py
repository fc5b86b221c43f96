"""Glyphs are the same anywhere and vary; Omniglot's splits are the published ones."""

import csv

import numpy as np
import pytest

from pipelines.records import DataError
from pipelines.sources import open_source


def test_glyphs_depend_on_seed_class_and_drawing_alone():
    small = open_source("glyphs", classes=(3, 2, 2), drawings=4)
    large = open_source("glyphs", classes=(5, 2, 2), drawings=6)
    first = small.load_block("train", [0, 1, 4])
    assert first.shape == (3, 1, 28, 28)
    assert first.dtype == np.uint8
    assert np.array_equal(first, large.load_block("train", [0, 1, 6]))
    assert not np.array_equal(first[0], first[1])
    assert (first.max(axis=(1, 2, 3)) == 255).all()
    assert small.fingerprint != large.fingerprint
    assert {r.class_name for r in small.splits["train"]}.isdisjoint(r.class_name for r in small.splits["test"])


def test_impossible_requests_are_refused():
    with pytest.raises(DataError, match="remove --source"):
        open_source("glyphs", "somewhere")
    with pytest.raises(DataError, match="known: glyphs, omniglot"):
        open_source("omniglott")
    with pytest.raises(DataError, match="has no option 'size'"):
        open_source("glyphs", size=3)


@pytest.mark.real_data
def test_vinyals_split_is_the_published_list(data_root):
    source = open_source("omniglot", str(data_root / "omniglot"), split="vinyals")
    with open(data_root / "omniglot" / "vinyals-split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "validation", "test"):
        listed = {f"{r['archive']}/{r['alphabet']}/{r['character']}" for r in rows if r["split"] in (split, split[:3])}
        ours = {record.class_name.split("@")[0] for record in source.splits[split]}
        assert ours == listed


@pytest.mark.real_data
def test_all_of_omniglot_is_there_with_rotations_as_classes(data_root):
    source = open_source("omniglot", str(data_root / "omniglot"))
    classes = {split: {record.class_name for record in records} for split, records in source.splits.items()}
    assert {split: len(names) for split, names in classes.items()} == {"train": 4800, "validation": 400, "test": 1292}
    assert [len(records) for records in source.splits.values()] == [96_000, 8_000, 25_840]
    characters = {split: {name.split("@")[0] for name in names} for split, names in classes.items()}
    assert not characters["train"] & characters["test"]
    image = source.load_block("test", [0])
    assert image.shape == (1, 1, 28, 28)
    assert 0.02 < (image > 127).mean() < 0.5
