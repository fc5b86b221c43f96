"""`model.normalise` of an encoder follows its features into the model that is trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from called_commands import refusal_of
from command_words import TINY, set_words
from PIL import Image

from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.package import load_model

COMMON = TINY | {"validation.every": 0, "run.figures": "false", "data.reader": "memory"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 40 random colour images."""
    source, out = (tmp_path_factory.mktemp("photographs") / name for name in ("source", "data"))
    source.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    write_dataset(open_source("folder", source=str(source), size=28, channels=3), out)
    return out


def test_model_on_features_normalises_images_as_their_encoder_did(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, features, out = (tmp_path / name for name in ("encoder", "features", "model"))
    settings = COMMON | {"data.uri": photographs, "run.out": run, "model.normalise": "imagenet"}
    assert main(["pretrain", "omniglot-cpu", "--json", *set_words(settings)]) == 0
    words = ["--data", str(photographs), "--out", str(features), "--dtype", "float32"]
    assert main(["features", str(run), *words]) == 0
    assert Dataset.open(features).manifest["encoder"]["normalise"] == "imagenet"

    settings = COMMON | {"data.uri": features, "run.out": out, "pretrain.steps": 0}
    assert main(["train", "omniglot-cpu", "--json", *set_words(settings)]) == 0
    loaded = load_model(out)
    assert loaded.settings.model.normalise == "imagenet"
    encoded = encode_images(loaded.model, Dataset.open(photographs).images("train"), torch.device("cpu"))
    stored = np.asarray(Dataset.open(features).rows("train")[np.arange(len(encoded))])
    assert torch.allclose(encoded, loaded.model.scale_features(torch.from_numpy(stored)), atol=1e-3)


def test_grey_images_are_refused_in_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = COMMON | {"data.uri": data, "run.out": tmp_path / "run", "model.normalise": "imagenet"}
    line = refusal_of("train", "omniglot-cpu", *set_words(settings))
    assert 'model.normalise ("imagenet") needs three channels' in line
