"""A model, settings and a batch that a step in float64 takes a moment for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metagmvae.configs.schema import TrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.models.meta_gmvae import MetaGMVAE

B, M, SHAPE = 2, 6, (1, 6, 6)


def settings(**changes: Any) -> TrainSettings:
    base = {
        "batch": B,
        "set_size": M,
        "samples": 4,
        "components": 3,
        "em_iterations": 3,
        "channels_last": False,
    }
    return TrainSettings(**{**base, **changes})


def model(dtype: torch.dtype = torch.float64, **changes: Any) -> MetaGMVAE:
    torch.manual_seed(0)
    sizes = {"latent": 2, "channels": 3, "width": 4, "heads": 2, "layers": 1}
    net = MetaGMVAE(SHAPE, **{**sizes, **changes}).to(dtype).eval()
    for layer in net.modules():  # away from zero, where a dead map would sit on the kink of its ReLU
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.bias, 0.1, 0.5)
    if dtype == torch.float64:
        net.scale_images = lambda images: images.double() / 255  # type: ignore[method-assign]
    return net


def batch(episodes: tuple[int, ...] = (4, 7), seed: int = 0) -> SetBatch:
    images = [np.random.default_rng([seed, e]).integers(0, 256, (M, *SHAPE), dtype=np.uint8) for e in episodes]
    return SetBatch(np.stack(images), np.array(episodes, dtype=np.int64), step=0)
