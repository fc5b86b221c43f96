"""Steps that see views of images: contrast, and the denoising form of the objective."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from small_model import SHAPE, M, batch, model, settings
from torch import Tensor, nn

from metagmvae.configs.schema import PretrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.trainer.builders import build_view
from metagmvae.training.trainer.steps import ContrastiveStep, MetaStep


def test_contrastive_step_is_nt_xent_of_two_views() -> None:
    net = model(torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    step = ContrastiveStep(net, nn.Identity(), settings(seed=3), PretrainSettings(temperature=0.3)).eval()
    seen: list[Tensor] = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss, terms = step(images, 8)
    assert terms == {}
    first, second = net.encoder(seen[0]).chunk(2)
    expected = reference.nt_xent(first.detach().double().numpy(), second.detach().double().numpy(), 0.3)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(loss, nt_xent(first, second, 0.3))
    assert torch.equal(loss, step(images, 8)[0])
    assert not torch.equal(loss, step(images, 9)[0])
    assert not torch.equal(seen[0][:5], seen[0][5:])


def test_views_go_by_the_channels_or_by_the_setting_at_the_size_of_the_encoder() -> None:
    for channels, views, size, kind in [
        (1, "auto", 0, "stroke_view"),
        (3, "auto", 0, "photo_view"),
        (3, "strokes", 0, "stroke_view"),
        (1, "photographs", 20, "photo_view"),
    ]:
        net = MetaGMVAE((channels, 28, 28), channels=4, width=8, heads=2, layers=1, image_size=size)
        step = ContrastiveStep(
            net, nn.Identity(), settings(), PretrainSettings(views=views, crop_area=0.3, elastic=0.2)
        )
        assert step.view.func.__name__ == kind
        settled = {"elastic": 0.2} if kind == "stroke_view" else {"size": size or 28, "min_area": 0.3}
        assert step.view.keywords == settled
        images = np.random.default_rng(0).integers(0, 256, (5, channels, 28, 28), dtype=np.uint8)
        loss, _ = step.train()(images, 1)
        loss.backward()
        assert torch.isfinite(loss)


def test_denoising_encodes_views_and_reconstructs_the_images() -> None:
    """The step of a model that is shown the views, but for what is reconstructed."""
    net = model(torch.float32)
    view = build_view(PretrainSettings(elastic=0.3), net)
    seen: list[Tensor] = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoded: list[Tensor] = []
    net.decoder.register_forward_hook(lambda module, args, logits: decoded.append(logits))
    sets = batch()
    _, terms = MetaStep(net, settings(), view).eval()(sets)
    x = net.scale_images(torch.from_numpy(sets.images).flatten(0, 1))
    assert not torch.equal(seen[0], x)
    expected = [
        reference.bernoulli_log_likelihood(image.double().numpy(), logits.detach().double().sigmoid().numpy())
        for image, logits in zip(x, decoded[0], strict=True)
    ]
    assert float(terms["reconstruction"]) == pytest.approx(np.mean(expected), rel=1e-5)

    shown = SetBatch(sets.images, sets.episodes, 0)
    net.scale_images = lambda images: seen[0]  # type: ignore[method-assign]
    _, of_views = MetaStep(net, settings()).eval()(shown)
    assert torch.equal(of_views["prior"], terms["prior"])
    assert torch.equal(of_views["entropy"], terms["entropy"])


def test_the_views_of_an_episode_do_not_depend_on_what_else_is_in_the_step() -> None:
    net = model(torch.float32)
    step = MetaStep(net, settings(), build_view(PretrainSettings(), net)).eval()
    seen: list[Tensor] = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    both = batch()
    step(both)
    step(SetBatch(both.images[1:], both.episodes[1:], 9))
    assert torch.equal(seen[0][M:], seen[1])
    step(SetBatch(both.images[1:], both.episodes[1:] + 1, 9))
    assert not torch.equal(seen[1], seen[2])


def test_the_projector_stands_between_features_and_loss() -> None:
    net, head = model(torch.float32), nn.Linear(model().feature_dim, 3)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    step = ContrastiveStep(net, head, settings(), PretrainSettings(temperature=0.3)).eval()
    seen: list[Tensor] = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss, _ = step(images, 8)
    assert torch.equal(loss, nt_xent(*head(net.encoder(seen[0])).chunk(2), 0.3))
    loss.backward()
    assert head.weight.grad is not None


def test_contrastive_step_trains_the_encoder_and_nothing_else() -> None:
    net = model(torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    ContrastiveStep(net, nn.Identity(), settings(), PretrainSettings(temperature=0.3)).train()(images, 1)[0].backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == {f"encoder.{name}" for name, _ in net.encoder.named_parameters()}
