"""Presets of the paper and of its published code: steps against literal transcriptions, old packages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from metagmvae.configs.load import load_settings
from metagmvae.configs.schema import Settings
from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.objectives.distinct_points import init_indices
from metagmvae.training.trainer.builders import build_encoder_model, build_model
from metagmvae.training.trainer.package import LoadedModel, load_package, save_package

SHAPE = (3, 32, 32)
SMALL = ["model.channels=4", "model.width=8", "model.latent=3", "train.samples=4", "train.decode_samples=4"]


def published(name: str) -> Settings:
    return load_settings(f"{name}-published-code", SMALL)


def test_step_on_mini_imagenet_is_the_loss_of_the_published_code() -> None:
    """Summed squared error without a factor, plus the KL divergence; means over the points and samples."""
    settings = published("mini-imagenet")
    train, M, episodes = settings.train, settings.train.set_size, (4, 7)
    model = build_model(settings.model, SHAPE, 0).double().eval()
    features = np.random.default_rng(0).gamma(1.0, size=(2, M, model.feature_dim))
    loss, terms = MetaStep(model, train).eval()(SetBatch(features, np.array(episodes), step=0))
    losses = []
    for h, episode in zip(features, episodes, strict=True):
        generator = keyed_generator(torch.device("cpu"), train.seed, "meta", episode)
        noise = torch.randn(M, train.samples, model.latent, generator=generator)
        with torch.no_grad():
            mean, log_variance = (part[0] for part in model.posterior(torch.tensor(h)[None]))
            z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise
            decoded = model.decode(z.flatten(0, 1)).unflatten(0, (M, train.samples)).numpy()
        rows = init_indices(z.flatten(0, 1)[None], train.components, [generator])[0]
        weights, means = reference.em(z.flatten(0, 1).numpy(), rows.tolist(), train.em_iterations)
        arrays = (z.numpy(), mean.numpy(), log_variance.exp().numpy())
        losses.append(reference.published_code_loss(h, decoded, *arrays, weights, means))
    assert float(loss.detach()) == pytest.approx(np.mean(losses), rel=1e-8)
    assert float(terms["reconstruction"]) < -0.1  # far from zero, where a factor would not be seen


def test_simclr_of_the_published_code_normalises_its_images(tmp_path: Path) -> None:
    """In training and in a package; a package of an older version, without the setting, has no normalisation."""
    settings = load_settings("mini-imagenet-simclr-published-code", ["model.channels=4"])
    model = build_encoder_model(settings.model, SHAPE, 0).eval()
    images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)
    expected = encode_images(model, images, torch.device("cpu"))
    path = save_package(tmp_path / "package", LoadedModel(model, settings, SHAPE, {}))
    loaded = load_package(path)
    assert loaded.settings.model.normalise == "imagenet"
    assert torch.allclose(encode_images(loaded.model, images, torch.device("cpu")), expected, atol=1e-5)

    plain = load_settings("mini-imagenet-simclr-paper", ["model.channels=4"])
    old_model = build_encoder_model(plain.model, SHAPE, 0).eval()
    old = save_package(tmp_path / "old", LoadedModel(old_model, plain, SHAPE, {}))
    card = json.loads((old / "model.json").read_text())
    del card["settings"]["model"]["normalise"], card["settings"]["pretrain"]["crops"]
    (old / "model.json").write_text(json.dumps(card))
    assert card["weights_sha256"] == sha256_file(old / "model.safetensors")
    loaded = load_package(old)
    assert loaded.settings.model.normalise == "none"
    before = encode_images(old_model, images, torch.device("cpu"))
    assert torch.allclose(encode_images(loaded.model, images, torch.device("cpu")), before, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)
