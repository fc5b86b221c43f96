"""Small models, images and step modules for the tests of the objectives of pre-training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.pretraining.step import PretrainStep
from metagmvae.training.trainer.builders import build_encoder_model

SHAPE = (1, 8, 8)


def small_settings(objective: str, model: dict[str, Any] | None = None, **pretrain: Any) -> Settings:
    """Settings with small networks; channels last is off, so that double precision tests run on plain tensors."""
    sections = {
        "model": {"channels": 4, "width": 16, "rectified": False} | (model or {}),
        "pretrain": {"objective": objective, "batch": 8} | pretrain,
        "train": {"seed": 3, "channels_last": False},
    }
    return Settings.model_validate(sections)


def small_step(
    kind: type[PretrainStep],
    settings: Settings,
    shape: tuple[int, int, int] = SHAPE,
    images: int = 40,
    dtype: torch.dtype = torch.float64,
) -> PretrainStep:
    """A step module in training mode, initialised by seed 0."""
    model: EncoderModel = build_encoder_model(settings.model, shape, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auxiliary = kind.build_auxiliary(model, settings, images)
    return kind(model, auxiliary, settings.train, settings.pretrain).to(dtype)


def random_images(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """uint8 (n, C, H, W)."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def gradients(loss: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of a loss in each parameter of a module; zero where the loss does not depend on it."""
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
