"""Wrong settings of methods that learn from tasks: exit code 2 and one line before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from called_commands import called
from command_words import set_words
from PIL import Image

from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of images without classes."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    write_dataset(open_source("folder", str(folder / "images"), size=28, channels=1), folder / "data")
    return folder / "data"


def error(data: Path, out: Path, preset: str, changes: dict[str, object]) -> str:
    """The only line of a refused request."""
    settings = {"data.uri": data, "run.out": out, "tracking.enabled": "false"} | changes
    code, answer, said = called("train", preset, *set_words(settings))
    assert (code, answer) == (2, "")
    assert not out.exists()
    (line,) = [line for line in said.splitlines() if "goes on without validation" not in line]
    return line


@pytest.mark.parametrize("preset", ["omniglot-maml-oracle", "omniglot-protonets-oracle"])
def test_labels_that_the_dataset_does_not_have(preset: str, unlabelled: Path, tmp_path: Path) -> None:
    line = error(unlabelled, tmp_path / "run", preset, {})
    assert 'method.tasks is "labels"' in line
    assert "have no classes" in line


@pytest.mark.parametrize(
    ("preset", "changes", "words"),
    [
        ("omniglot-maml-oracle", {"method.way": 31}, ("method.way is 31", "only 30 classes", "lower")),
        ("omniglot-maml-oracle", {"method.way": 4}, ("validation.way is 5", "up to 4 classes", "method.way")),
        ("omniglot-umtra", {"train.compile": "true"}, ("train.compile is true", "of maml cannot", "set it to false")),
        ("omniglot-umtra", {"method.way": 601}, ("method.way is 601", "600 images")),
        ("omniglot-umtra", {"method.shot": 2}, ("method: shot (2) must be 1",)),
        ("omniglot-maml-oracle", {"method.network": "mlp"}, ('method.network = "mlp"', "pretrain.steps above 0")),
        ("omniglot-scratch", {"method.network": "mlp"}, ('method.network = "mlp"', "pretrain.steps above 0")),
        ("omniglot-cactus-acai-maml", {"pretrain.steps": 0}, ('method.tasks = "clusters"', "pretrain.steps above 0")),
        ("omniglot-cactus-acai-maml", {"method.clusters": 601}, ("method.clusters is 601", "600 training images")),
        ("omniglot-maml-oracle", {"train.steps": 0}, ("train.steps is 0",)),
        ("omniglot-scratch", {"train.steps": 5}, ("train.steps is 5", "scratch is not meta-trained", "0")),
        ("omniglot-maml-oracle", {"method.name": "mamml"}, ("method.name (mamml): no such method", "maml")),
        ("omniglot-maml-oracle", {"data.reader": "stream"}, ("data.reader", "set it to mmap")),
        ("omniglot-cpu", {"validation.shots": "[]"}, ("validation.shots is empty", "set validation.every to 0")),
        ("omniglot-cpu", {"validation.way": 99}, ("way 99 exceeds the", "validation.way, validation.shots and valid")),
        ("omniglot-cpu", {"validation.query": 99}, ("query 99 need", "or set validation.every to 0")),
    ],
)
def test_settings_that_do_not_fit(
    preset: str, changes: dict[str, object], words: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    line = error(data, tmp_path / "run", preset, changes)
    assert all(word in line for word in words), line


def test_fewer_shards_than_workers_are_refused_before_ray_starts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # its import would fail
    changes = {"data.reader": "stream", "run.engine": "ray", "run.workers": 2, "train.batch": 2}
    line = error(data, tmp_path / "run", "omniglot-5way", changes)
    assert "split 'train' has 1 shards for 2 workers; lower run.workers, use data.reader = mmap, or write more" in line
