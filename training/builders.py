"""Settings -> model, optimiser, schedule: the one place in `training` that unpacks them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from configs.schema import ModelSettings, TrainSettings, WarmupSettings
from training.meta_gmvae import MetaGMVAE


def build_model(settings: ModelSettings, image_shape: tuple[int, int, int], seed: int) -> MetaGMVAE:
    """A freshly initialised model; a function of the settings and the seed, not of global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MetaGMVAE(
            image_shape,
            reconstruct=settings.reconstruct,
            latent=settings.latent,
            channels=settings.channels,
            width=settings.width,
            heads=settings.heads,
            layers=settings.layers,
            attention_scale=settings.attention_scale,
            attention_block=settings.attention_block,
            attention_activation=settings.attention_activation,
            posterior=settings.posterior,
        )


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam with coupled weight decay, as the paper's experiments use it (row 8)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def build_warmup_optimizer(model: nn.Module, settings: WarmupSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def build_schedule(optimizer: torch.optim.Optimizer, kind: str, steps: int) -> LambdaLR:
    """`constant`, `cosine` to zero, or `one-cycle` (up for 30% of the steps, down for the rest)."""

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        if kind == "constant":
            return 1.0
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        rising = 0.3
        if done < rising:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / rising))
        return 0.5 * (1 + math.cos(math.pi * (done - rising) / (1 - rising)))

    return LambdaLR(optimizer, factor)
