"""Features that a worker computes are those of the images that the command was started with."""

import shutil

import numpy as np
import pytest

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.feature_source import open_features
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


def mean_pixel(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).mean(axis=1, keepdims=True, dtype=np.float32)


def test_a_node_with_another_copy_of_the_images_encodes_nothing(dataset, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "data")
    copy = Dataset.open(tmp_path / "data")
    source = open_features(copy, mean_pixel, feature_size=1, encoder={"sha256": "0" * 64}, dtype="float32")
    expected = mean_pixel(copy.images("train")[np.array([0, 5])])
    assert np.array_equal(source.load_block("train", [0, 5]), expected)
    shutil.rmtree(tmp_path / "data")
    write_dataset(open_source("glyphs", classes=(8, 6, 3), drawings=19), tmp_path / "data")
    with pytest.raises(DataError, match=r"data on .*: is another dataset \(\w{12}…\) than the one that the command"):
        source.load_block("validation", [0])
