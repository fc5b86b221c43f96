"""The programs in the guides pipelines/README.md and pipelines/sources/README.md run."""

import re
import warnings
from pathlib import Path

import numpy as np

from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources import source
from metagmvae.pipelines.sources.source import open_source

PIPELINES = Path(source.__file__).parents[1]


def programs(guide: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)


def test_programs_of_the_data_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(open_source("glyphs", classes=(30, 2, 2), drawings=20), tmp_path / "data" / "omniglot")
    read, read_with_webdataset = programs(PIPELINES / "README.md")
    names: dict = {}
    exec(read, names)
    assert names["images"][[5, 0]].shape == (2, 1, 28, 28)
    assert (len(names["labels"]), names["names"]) == (40, ["test-0000", "test-0001"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close its files
        exec(read_with_webdataset, names)
    assert names["images"].shape == (600 - 512, 1, 28, 28)


def test_the_source_of_the_guide(tmp_path, monkeypatch):
    (program,) = programs(PIPELINES / "sources" / "README.md")
    assert len(program.splitlines()) < 40
    (tmp_path / "arrays_of_the_guide.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(source.OPENERS, "arrays", "arrays_of_the_guide:open_arrays")
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 5), dtype=np.uint8)
    labels, splits = np.repeat([0, 1, 2, 3], 3), np.repeat(["train", "validation"], 6)
    np.savez(tmp_path / "images.npz", images=images, labels=labels, splits=splits)
    write_dataset(open_source("arrays", str(tmp_path / "images.npz")), tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    for split, offset in (("train", 0), ("validation", 6)):
        for image, row in zip(dataset.images(split), dataset.index(split).to_pylist(), strict=True):
            number = int(row["key"])
            assert offset <= number < offset + 6
            assert np.array_equal(image[0], images[number])
            assert row["class_name"] == str(labels[number])
