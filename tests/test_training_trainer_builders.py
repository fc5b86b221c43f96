"""Builders: models depend on settings and seed; optimisers and schedules against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from metagmvae.configs.schema import ModelSettings, PretrainSettings, TrainSettings
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.augment.photos import photo_view
from metagmvae.training.models.conv import ConvDecoder, FeatureDecoder
from metagmvae.training.models.feature_scaling import FeatureWhitening
from metagmvae.training.models.set_attention import elu
from metagmvae.training.trainer.builders import (
    build_encoder_model,
    build_model,
    build_optimizer,
    build_pretrain_optimizer,
    build_schedule,
)
from metagmvae.training.trainer.lars import Lars

SHAPE = (1, 12, 12)
TINY = {"latent": 3, "channels": 4, "width": 8, "heads": 2, "layers": 1}


def test_model_depends_on_settings_and_seed_only() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(ModelSettings(**TINY), SHAPE, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = build_model(ModelSettings(**TINY), SHAPE, seed=5)
    other = build_model(ModelSettings(**TINY), SHAPE, seed=6)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"latent": 5}, lambda m: m.latent == 5 and m.head.out_features == 10),
        ({"channels": 6}, lambda m: m.encoder.blocks[0].conv.out_channels == 6),
        ({"width": 12}, lambda m: m.head.in_features == 12),
        ({"heads": 4}, lambda m: m.attention.blocks[0].heads == 4),
        ({"layers": 0}, lambda m: len(m.attention.blocks) == 0),
        ({"layers": 3}, lambda m: len(m.attention.blocks) == 3),
        ({"attention_scale": "head"}, lambda m: m.attention.blocks[0].scale == 0.5),
        ({"attention_scale": "model"}, lambda m: m.attention.blocks[0].scale == 1 / math.sqrt(8)),
        ({"attention_block": "transformer"}, lambda m: m.attention.blocks[0].output is not None),
        ({"attention_block": "set-attention"}, lambda m: m.attention.blocks[0].output is None),
        ({"attention_activation": "elu"}, lambda m: m.attention.blocks[0].activation is elu),
        ({"attention_activation": "relu"}, lambda m: m.attention.blocks[0].activation is nn.functional.relu),
        ({"posterior": "isotropic"}, lambda m: m.head.out_features == 4),
        ({"posterior": "diagonal"}, lambda m: m.head.out_features == 6),
        ({"encoder": "conv5", "image_size": 32}, lambda m: len(m.encoder.net.blocks) == 5),
        ({"encoder": "resnet18"}, lambda m: type(m.encoder.net).__name__ == "ResNet" and m.inlet.in_features == 512),
        ({"average": "crops"}, lambda m: m.encoder.averaging == "crops"),
        ({"image_size": 20}, lambda m: m.encoder.size == (20, 20)),
        ({}, lambda m: [b.relu for b in m.encoder.blocks] == [True] * 4),
        ({"rectified": False}, lambda m: [b.relu for b in m.encoder.blocks] == [True] * 3 + [False]),
        (
            {"reconstruct": "features", "features": "raw", "rectified": False},
            lambda m: isinstance(m.decoder.mlp[-1], nn.Linear),
        ),
        ({"reconstruct": "features", "features": "raw"}, lambda m: isinstance(m.scale, nn.Identity)),
        ({"reconstruct": "features", "features": "raw"}, lambda m: isinstance(m.decoder.mlp[-1], nn.ReLU)),
        ({"reconstruct": "features", "features": "standard"}, lambda m: isinstance(m.decoder.mlp[-1], nn.Linear)),
        ({"reconstruct": "features", "features": "whitened"}, lambda m: isinstance(m.scale, FeatureWhitening)),
        ({"variance": "unit"}, lambda m: m.variance == "unit"),
        ({"variance": "half"}, lambda m: m.variance == "half"),
        ({}, lambda m: m.encoder.normalise is None),
        ({"normalise": "imagenet"}, lambda m: m.encoder.normalise is not None),
        ({"reconstruct": "pixels"}, lambda m: isinstance(m.decoder, ConvDecoder)),
        ({"reconstruct": "features"}, lambda m: isinstance(m.decoder, FeatureDecoder)),
    ],
)
def test_every_model_setting_takes_effect(changes: dict[str, Any], check: Any) -> None:
    shape = (3, 12, 12) if "normalise" in changes else SHAPE
    assert check(build_model(ModelSettings(**{**TINY, **changes}), shape, seed=0))


def test_every_model_setting_is_tested() -> None:
    marks = test_every_model_setting_takes_effect.pytestmark[0].args[1]  # type: ignore[attr-defined]
    of_other_packages = {"options"}  # tests/test_infra_api_extensions.py
    assert {key for changes, _ in marks for key in changes} == set(ModelSettings.model_fields) - of_other_packages


@pytest.mark.parametrize("crops", ["clipped", "torchvision"])
def test_view_follows_the_settings_of_photographs(crops: str) -> None:
    model = build_encoder_model(ModelSettings(**TINY), (3, 12, 12), 0)
    settings = PretrainSettings.model_validate({"crops": crops, "crop_area": 0.3})
    x = torch.rand(4, 3, 12, 12)
    expected = photo_view(x, torch.Generator().manual_seed(0), 12, 0.3, settings.crops)
    assert torch.equal(build_view(settings, model)(x, torch.Generator().manual_seed(0)), expected)


def one_step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: float) -> float:
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    return float(weight.detach())


def test_meta_training_uses_adam_with_coupled_weight_decay() -> None:
    """Coupled decay is added to the gradient before the moments. The first step of Adam is lr times the sign of the
    sum, and the decay of a large weight changes the sign of a small gradient."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 4.0)
    optimizer = build_optimizer(module, TrainSettings(learning_rate=0.1, weight_decay=0.5))
    assert type(optimizer) is torch.optim.Adam
    assert one_step(optimizer, module.weight, -1.0) == pytest.approx(3.9)  # -1 + 0.5 * 4 > 0
    nn.init.constant_(module.weight, 4.0)
    optimizer = build_optimizer(module, TrainSettings(learning_rate=0.1))
    assert one_step(optimizer, module.weight, -1.0) == pytest.approx(4.1)


def test_pretraining_uses_adamw_with_decoupled_weight_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 4.0)
    optimizer = build_pretrain_optimizer([module], PretrainSettings(learning_rate=0.1, weight_decay=0.5))
    assert one_step(optimizer, module.weight, -1.0) == pytest.approx(4.0 * (1 - 0.1 * 0.5) + 0.1)


def test_optimizers_of_pretraining_include_the_projector() -> None:
    modules = [nn.Linear(1, 1), nn.Linear(1, 1)]
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "lars": Lars, "sgd": torch.optim.SGD}
    for name, kind in kinds.items():
        optimizer = build_pretrain_optimizer(modules, PretrainSettings(optimizer=name, weight_decay=0.3))
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert len(optimizer.param_groups[0]["params"]) == 4


def test_pretraining_settings_reach_the_optimizer() -> None:
    modules = [nn.Linear(1, 1)]
    for name in ("adam", "adamw"):
        assert (
            build_pretrain_optimizer(modules, PretrainSettings(optimizer=name, beta1=0.5)).defaults["betas"][0] == 0.5
        )
        assert build_pretrain_optimizer(modules, PretrainSettings(optimizer=name)).defaults["betas"] == (0.9, 0.999)
    sgd = build_pretrain_optimizer(modules, PretrainSettings(optimizer="sgd", beta1=0.8, learning_rate=0.1))
    assert (sgd.defaults["momentum"], sgd.defaults["lr"]) == (0.8, 0.1)
    modules[0].bias.requires_grad_(False)
    (group,) = build_pretrain_optimizer(modules, PretrainSettings()).param_groups
    assert [id(p) for p in group["params"]] == [id(modules[0].weight)]
    with pytest.raises(ValueError, match=r"beta1 \(0.5\) is a setting of Adam and SGD, but optimizer is lars"):
        PretrainSettings(optimizer="lars", beta1=0.5)


def test_encoder_model_has_the_initial_weights_of_the_complete_model() -> None:
    settings = ModelSettings(**TINY)
    encoder_only, complete = build_encoder_model(settings, SHAPE, 3), build_model(settings, SHAPE, 3)
    actual, expected = encoder_only.encoder.state_dict(), complete.encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_frozen_parameters_are_not_optimised() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    optimizer = build_optimizer(module, TrainSettings())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module[1].parameters()]


def rates(kind: str, steps: int) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = build_schedule(optimizer, kind, steps)
    history = []
    for _ in range(steps):
        history.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*history, optimizer.param_groups[0]["lr"]]


def test_schedules_equal_closed_forms() -> None:
    assert rates("constant", 7) == [2.0] * 8
    assert rates("cosine", 10) == pytest.approx([1 + math.cos(math.pi * s / 10) for s in range(11)], abs=1e-12)
    cycle = rates("one-cycle", 100)
    assert cycle[0] == pytest.approx(0.08)
    assert cycle.index(max(cycle)) == 30
    assert cycle[30] == pytest.approx(2.0)
    assert cycle[65] == pytest.approx(1.0)  # halfway down
    assert cycle[100] == pytest.approx(0.0, abs=1e-12)
    assert cycle[:31] == sorted(cycle[:31])
    assert cycle[30:] == sorted(cycle[30:], reverse=True)


def test_published_code_schedule_is_a_cosine_over_epochs() -> None:
    """Constant for 10 epochs, then a cosine: zero after 75 more epochs, back at 1 after another 75."""
    parameter = nn.Parameter(torch.zeros(1))
    schedule = build_schedule(torch.optim.SGD([parameter], lr=1.0), "published-code", 600, steps_per_epoch=3)
    factor = schedule.lr_lambdas[0]
    assert [factor(step) for step in range(33)] == [1.0] * 33
    assert factor(33) == factor(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 75)))
    assert factor(3 * 85) == pytest.approx(0.0, abs=1e-12)
    assert factor(3 * 160) == pytest.approx(1.0)
    other = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=75)
    for epoch in range(10, 200):
        assert factor(3 * epoch) == pytest.approx(other.param_groups[0]["lr"], abs=1e-9)
        other.step()
        cosine.step()


def test_schedule_of_zero_steps() -> None:
    assert len(rates("one-cycle", 0)) == 1
