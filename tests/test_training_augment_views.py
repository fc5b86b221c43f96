"""Training steps that use views: contrastive pre-training, and denoising in meta-training."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from small_model import SHAPE, M, batch, model, settings
from torch import Tensor, nn

from metagmvae.configs.schema import ModelSettings, PretrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.pretraining.contrastive import ContrastiveStep


def record_encoder_inputs(net: MetaGMVAE) -> list[Tensor]:
    """A list to which every forward pass appends the input of the encoder."""
    inputs: list[Tensor] = []
    net.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return inputs


def test_contrastive_step_is_nt_xent_of_two_views() -> None:
    net = model(torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    step = ContrastiveStep(net, nn.Identity(), settings(seed=3), PretrainSettings(temperature=0.3)).eval()
    inputs = record_encoder_inputs(net)
    loss, terms = step(images, 8)
    assert terms == {}
    first, second = net.encoder(inputs[0]).chunk(2)
    expected = reference.nt_xent(first.detach().double().numpy(), second.detach().double().numpy(), 0.3)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(loss, nt_xent(first, second, 0.3))
    assert torch.equal(loss, step(images, 8)[0])
    assert not torch.equal(loss, step(images, 9)[0])
    assert not torch.equal(inputs[0][:5], inputs[0][5:])


def test_kind_and_size_of_views_follow_the_settings_and_the_encoder() -> None:
    for channels, views, size, kind in [
        (1, "auto", 0, "stroke_view"),
        (3, "auto", 0, "photo_view"),
        (3, "strokes", 0, "stroke_view"),
        (1, "photographs", 20, "photo_view"),
    ]:
        net = MetaGMVAE(ModelSettings(channels=4, width=8, heads=2, layers=1, image_size=size), (channels, 28, 28))
        step = ContrastiveStep(
            net, nn.Identity(), settings(), PretrainSettings(views=views, crop_area=0.3, elastic=0.2)
        )
        assert step.view.func.__name__ == kind
        photo = {"size": size or 28, "min_area": 0.3, "crops": "clipped"}
        expected = {"elastic": 0.2} if kind == "stroke_view" else photo
        assert step.view.keywords == expected
        images = np.random.default_rng(0).integers(0, 256, (5, channels, 28, 28), dtype=np.uint8)
        loss, _ = step.train()(images, 1)
        loss.backward()
        assert torch.isfinite(loss)


def test_denoising_encodes_views_and_reconstructs_the_images() -> None:
    """Prior and entropy are those of a step on the views; the reconstruction term is that of the images."""
    net = model(torch.float32)
    view = build_view(PretrainSettings(elastic=0.3), net)
    inputs = record_encoder_inputs(net)
    decoded: list[Tensor] = []
    net.decoder.register_forward_hook(lambda module, args, logits: decoded.append(logits))
    sets = batch()
    _, terms = MetaStep(net, settings(), view).eval()(sets)
    x = net.scale_images(torch.from_numpy(sets.images).flatten(0, 1))
    assert not torch.equal(inputs[0], x)
    expected = [
        reference.bernoulli_log_likelihood(image.double().numpy(), logits.detach().double().sigmoid().numpy())
        for image, logits in zip(x, decoded[0], strict=True)
    ]
    assert float(terms["reconstruction"]) == pytest.approx(np.mean(expected), rel=1e-5)

    net.scale_images = lambda images: inputs[0]  # type: ignore[method-assign]
    _, terms_of_views = MetaStep(net, settings()).eval()(sets)
    assert torch.equal(terms_of_views["prior"], terms["prior"])
    assert torch.equal(terms_of_views["entropy"], terms["entropy"])


def test_views_of_an_episode_do_not_depend_on_the_batch() -> None:
    net = model(torch.float32)
    step = MetaStep(net, settings(), build_view(PretrainSettings(), net)).eval()
    inputs = record_encoder_inputs(net)
    both = batch()
    step(both)
    step(SetBatch(both.images[1:], both.episodes[1:], 9))
    assert torch.equal(inputs[0][M:], inputs[1])
    step(SetBatch(both.images[1:], both.episodes[1:] + 1, 9))
    assert not torch.equal(inputs[1], inputs[2])


def test_projector_is_applied_before_the_loss() -> None:
    net, head = model(torch.float32), nn.Linear(model().feature_dim, 3)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    step = ContrastiveStep(net, head, settings(), PretrainSettings(temperature=0.3)).eval()
    inputs = record_encoder_inputs(net)
    loss, _ = step(images, 8)
    assert torch.equal(loss, nt_xent(*head(net.encoder(inputs[0])).chunk(2), 0.3))
    loss.backward()
    assert head.weight.grad is not None


def test_contrastive_step_trains_only_the_encoder() -> None:
    net = model(torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    ContrastiveStep(net, nn.Identity(), settings(), PretrainSettings(temperature=0.3)).train()(images, 1)[0].backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == {f"encoder.{name}" for name, _ in net.encoder.named_parameters()}
