"""Features averaged over several views of an image (`metagmvae features --average`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from called_commands import answer_of, refusal_of
from command_words import set_words

from metagmvae.infra.cli import main
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.multi_crop import MultiCropEncoder
from metagmvae.training.trainer.package import load_model

ENCODER = {"model.channels": 4, "pretrain.steps": 2, "pretrain.batch": 8, "validation.every": 0}
HEAD = {
    "pretrain.steps": 0,
    "model.width": 16,
    "model.latent": 4,
    "train.start": "components",
    "train.steps": 2,
    "train.set_size": 24,
    "train.samples": 4,
    "validation.episodes": 4,
}


def test_model_on_averaged_features_encodes_images_with_the_same_average(data: Path, tmp_path: Path) -> None:
    run, plain, crops, out = (tmp_path / name for name in ("encoder", "plain", "crops", "model"))
    common = {"tracking.enabled": "false", "run.figures": "false", "train.precision": "float32"}
    settings = ENCODER | common | {"data.uri": data, "run.out": run}
    assert main(["pretrain", "omniglot-cpu", "--json", *set_words(settings)]) == 0
    for folder, words in ((plain, []), (crops, ["--average", "crops"])):
        assert (
            main(["features", str(run), "--data", str(data), "--out", str(folder), "--dtype", "float32", *words]) == 0
        )
    encoders = [Dataset.open(folder).manifest["encoder"] for folder in (plain, crops)]
    assert [encoder["average"] for encoder in encoders] == ["none", "crops"]
    assert encoders[0]["sha256"] != encoders[1]["sha256"]

    settings = HEAD | common | {"data.uri": crops, "run.out": out}
    assert main(["train", "omniglot-cpu", "--json", *set_words(settings)]) == 0
    model = load_model(out).model
    assert isinstance(model.encoder, MultiCropEncoder)
    assert model.encoder.averaging == "crops"
    stored = Dataset.open(crops)
    encoded = encode_images(model, Dataset.open(data).images("test"), torch.device("cpu"))
    rows = np.asarray(stored.rows("test")[np.arange(len(encoded))])
    assert torch.allclose(encoded, model.scale_features(torch.from_numpy(rows)), atol=1e-4)
    evaluate = ["evaluate", str(out), "--data", str(plain), "--way", "5", "--shot", "1", "--episodes", "4"]
    assert main(evaluate) == 2


def test_model_settings_with_another_average_than_the_features_are_refused(data: Path, tmp_path: Path) -> None:
    run, mirror = tmp_path / "encoder", tmp_path / "mirror"
    common = {"tracking.enabled": "false", "run.figures": "false", "data.uri": data, "run.out": run}
    assert main(["pretrain", "omniglot-cpu", "--json", *set_words(ENCODER | common)]) == 0
    assert main(["features", str(run), "--data", str(data), "--out", str(mirror), "--average", "mirror"]) == 0
    settings = HEAD | common | {"data.uri": mirror, "run.out": tmp_path / "model", "model.average": "crops"}
    line = refusal_of("train", "omniglot-cpu", *set_words(settings))
    assert "model.average" in line
    assert "'mirror'" in line


def test_average_of_a_model_is_changed_in_both_directions(data: Path, tmp_path: Path) -> None:
    """Also at `image_size` 0, where a model without an average has no module around its encoder."""
    common = {"tracking.enabled": "false", "run.figures": "false", "data.uri": data, "train.precision": "float32"}
    run = tmp_path / "crops"
    settings = ENCODER | common | {"run.out": run, "model.average": "crops"}
    assert main(["pretrain", "omniglot-cpu", "--json", *set_words(settings)]) == 0
    made = {}
    for average in ("none", "mirror", "crops"):
        out = tmp_path / f"features-{average}"
        words = ["--data", str(data), "--out", str(out), "--average", average, "--dtype", "float32"]
        assert main(["features", str(run), *words]) == 0
        made[average] = Dataset.open(out).manifest["encoder"]["sha256"]
        head = HEAD | common | {"data.uri": out, "run.out": tmp_path / f"head-{average}", "validation.every": 0}
        assert main(["train", "omniglot-cpu", "--json", *set_words(head)]) == 0
    assert len(set(made.values())) == 3
    plain = load_model(run).model.encoder.eval()
    assert isinstance(plain, MultiCropEncoder)
    encoded = np.asarray(Dataset.open(tmp_path / "features-none").rows("test")[:4])
    images = torch.from_numpy(np.asarray(Dataset.open(data).images("test")[:4])).float() / 255
    with torch.no_grad():
        assert np.allclose(plain.net(images).numpy(), encoded, atol=1e-4)


def test_evaluation_with_affine_views_equals_that_on_features_of_them(data: Path, tmp_path: Path) -> None:
    """`evaluate --set model.average` changes a trained model or encoder, without calibration and stored result."""
    common = {"tracking.enabled": "false", "run.figures": "false", "data.uri": data, "train.precision": "float32"}
    run, encoder, features = tmp_path / "model", tmp_path / "encoder", tmp_path / "features"
    assert main(["train", "omniglot-cpu", "--json", *set_words(HEAD | ENCODER | common | {"run.out": run})]) == 0
    assert main(["pretrain", "omniglot-cpu", "--json", *set_words(ENCODER | common | {"run.out": encoder})]) == 0
    words = ["--data", str(data), "--out", str(features), "--average", "affine", "--dtype", "float32"]
    assert main(["features", str(run), "--json", *words]) == 0

    def answer(model: Path, dataset: Path, *words: str) -> dict[str, Any]:
        common = ["--way", "3", "--shot", "1", "--query", "3", "--episodes", "20"]
        return dict(answer_of("evaluate", model, "--data", dataset, *common, *words))

    affine = ("--set", "model.average=affine")
    on_images, on_features = (answer(run, uri, *affine) for uri in (data, features))
    assert on_images["accuracy"] == on_features["accuracy"] != answer(run, data)["accuracy"]
    assert "kept" not in on_images
    assert on_images["temperature"] == 1.0 != answer(run, data)["temperature"]
    assert answer(encoder, data, *affine)["accuracy"] != answer(encoder, data)["accuracy"]
    for value, message in (("model.average=corners", "model.average"), ("adapt.samples=2", "is an encoder alone")):
        assert message in refusal_of("evaluate", encoder, "--data", data, "--set", value)


def test_view_whitening_of_stored_features_is_refused(data: Path, tmp_path: Path) -> None:
    common = {"tracking.enabled": "false", "run.figures": "false", "data.uri": data, "run.out": tmp_path / "encoder"}
    assert main(["pretrain", "omniglot-cpu", "--json", *set_words(ENCODER | common)]) == 0
    features = tmp_path / "features"
    assert main(["features", str(tmp_path / "encoder"), "--data", str(data), "--out", str(features)]) == 0
    changed = {"data.uri": features, "run.out": tmp_path / "model", "model.features": "view-whitened"}
    line = refusal_of("train", "omniglot-cpu", *set_words(HEAD | common | changed))
    assert "model.features" in line
    assert "whitened" in line
    assert not (tmp_path / "model").exists()
