"""Features of a frozen encoder as the data of meta-training: encoded once, or read from feature shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.backbones import EncoderModel
from training.meta_gmvae import MetaGMVAE
from training.networks import FeatureScale, FeatureWhitening, even_out
from training.steps import to_device

ROWS = 1024
"""Rows that are worked on at once."""


class ScaledRows:
    """Features by row at the scale that the model works on: `rows[numbers] -> float32 (n, F)`, on the CPU."""

    def __init__(self, raw: Any, scale: nn.Module) -> None:
        self.raw = raw
        self.shape = tuple(raw.shape)
        self._scale = scale

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._scale(torch.from_numpy(np.asarray(self.raw[rows], dtype=np.float32))).numpy()


@torch.inference_mode()
def encode_all(model: EncoderModel, images: Any, device: torch.device, channels_last: bool) -> np.ndarray:
    """Features of all images as the encoder gives them, each encoded once: (n, F) float32.

    Every rank encodes all of them by the same weights and buffers, so all ranks have the same without a word.
    """
    model.eval()
    pieces = []
    for first in range(0, len(images), ROWS):
        rows = np.arange(first, min(first + ROWS, len(images)))
        x = model.scale_images(to_device(images[rows], device))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        pieces.append(model.encoder(x).float().cpu())
    return torch.cat(pieces).numpy()


def set_scale(model: MetaGMVAE, raw: Any) -> None:
    """Give the model the statistics of the training features, (n, F), read twice in pieces of rows."""
    scale = model.scale
    if not isinstance(scale, FeatureScale | FeatureWhitening):
        return
    count = len(raw)

    def pieces() -> Iterator[Tensor]:
        for first in range(0, count, ROWS):
            h = torch.as_tensor(np.asarray(raw[np.arange(first, min(first + ROWS, count))], dtype=np.float64))
            yield even_out(h) if isinstance(scale, FeatureWhitening) else h

    mean = torch.stack([piece.sum(dim=0) for piece in pieces()]).sum(dim=0) / count
    if isinstance(scale, FeatureScale):
        squares = torch.stack([(piece - mean).square().sum(dim=0) for piece in pieces()]).sum(dim=0)
        scale.set_statistics(mean, (squares / max(count - 1, 1)).sqrt())
        return
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for piece in pieces():
        covariance.addmm_((piece - mean).T, piece - mean, alpha=1 / max(count - 1, 1))
    scale.set_statistics(mean, covariance)
