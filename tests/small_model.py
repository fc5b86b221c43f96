"""A small model, settings and a batch, for fast training steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metagmvae.configs.schema import ModelSettings, TrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.methods.meta_gmvae import MetaGMVAE

B, M, SHAPE = 2, 6, (1, 6, 6)


def settings(**changes: Any) -> TrainSettings:
    """Settings of meta-training, with changes."""
    defaults = {
        "batch": B,
        "set_size": M,
        "samples": 4,
        "components": 3,
        "em_iterations": 3,
        "channels_last": False,
    }
    return TrainSettings(**{**defaults, **changes})


def model(dtype: torch.dtype = torch.float64, **changes: Any) -> MetaGMVAE:
    """The model in evaluation mode, with changed settings."""
    torch.manual_seed(0)
    sizes = {"latent": 2, "channels": 3, "width": 4, "heads": 2, "layers": 1}
    net = MetaGMVAE(ModelSettings(**{**sizes, **changes}), SHAPE).to(dtype).eval()
    for layer in net.modules():  # a constant map at zero would be at the kink of its ReLU
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.bias, 0.1, 0.5)
    if dtype == torch.float64:
        net.scale_images = lambda images: images.double() / 255  # type: ignore[method-assign]
    return net


def batch(episodes: tuple[int, ...] = (4, 7), seed: int = 0) -> SetBatch:
    """Random images, a function of seed and episode."""
    images = [np.random.default_rng([seed, e]).integers(0, 256, (M, *SHAPE), dtype=np.uint8) for e in episodes]
    return SetBatch(np.stack(images), np.array(episodes, dtype=np.int64), step=0)
