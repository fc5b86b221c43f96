"""The workflow on photographs that are stored encoded gives, bit for bit, what it gives on the decoded store."""

import numpy as np
import pytest
import torch
from called_commands import answer_of
from command_words import TINY, set_words
from photographs import SIDE, write_pictures

from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.package import load_model

STORES = ("decoded", "encoded")
SETTINGS = TINY | {"pretrain.views": "photographs", "pretrain.projector": "[16, 8]", "validation.query": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def pictures(folder):
    return write_pictures(folder / "pictures", classes=16)


@pytest.fixture(scope="module")
def data(folder, pictures):
    """Datasets of the same photographs by store."""
    for store in STORES:
        words = ["prepare", "folder", "--source", pictures, "--size", SIDE, "--out", folder / store, "--store", store]
        words += ["--validation-classes", 5, "--test-classes", 5, "--rows-per-shard", 24]
        assert main([str(word) for word in words]) == 0
    return {store: folder / store for store in STORES}


def train(data, out, **more):
    settings = SETTINGS | {"data.uri": data, "run.out": out} | more
    assert main(["train", "omniglot-cpu", "--json", *set_words(settings)]) == 0
    return load_model(out).model.state_dict()


def assert_equal_weights(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_training_evaluation_features_and_classification_are_equal(data, pictures, folder):
    weights, answers = {}, {}
    for store in STORES:
        run = folder / f"run-{store}"
        weights[store] = train(data[store], run)
        answers[store] = answer_of("evaluate", run, "--data", data[store], "--query", "5", "--episodes", "5")
        features = folder / f"features-{store}"
        assert main(["features", str(run), "--data", str(data[store]), "--out", str(features)]) == 0
    assert_equal_weights(weights["decoded"], weights["encoded"])
    same = ("accuracy", "ci95", "way", "shot")
    assert [answers["decoded"][key] for key in same] == [answers["encoded"][key] for key in same]
    for split in ("train", "validation", "test"):
        rows = [Dataset.open(folder / f"features-{store}").rows(split) for store in STORES]
        np.testing.assert_array_equal(*rows)
    # A model of one store is evaluated on the other: they are the same images.
    assert (
        main(
            ["evaluate", str(folder / "run-decoded"), "--data", str(data["encoded"]), "--query", "5", "--episodes", "2"]
        )
        == 0
    )
    support = folder / "support"
    for name in ("class0", "class1"):
        (support / name).mkdir(parents=True)
        (support / name / "one.jpg").write_bytes((pictures / name / "stays0.jpg").read_bytes())
    query = ["--query", pictures / "class0"]
    rows = []
    for store in STORES:
        rows.append(answer_of("classify", folder / f"run-{store}", "--support", support, *query)["queries"])
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["memory", "mmap", "device", "stream"])
def test_every_reader_trains_alike(reader, data, folder):
    more = {"data.reader": reader} | ({"model.reconstruct": "pixels"} if reader == "stream" else {})
    weights = [train(data[store], folder / f"{reader}-{store}", **more) for store in STORES]
    assert_equal_weights(*weights)
