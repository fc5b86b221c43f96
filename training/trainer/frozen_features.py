"""Features of a frozen encoder as the data of meta-training: encoded once, or read from feature shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.pipelines.records import Rows
from metagmvae.training.device.seeding import to_device
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening, whiten
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.models.pca_init import init_from_pca

ROWS = 1024
"""Rows that are worked on at once."""
Pieces = Callable[[], Iterator[Tensor]]


class ScaledRows:
    """Features by row at the scale that the model works on: `rows[numbers] -> float32 (n, F)`, on the CPU."""

    def __init__(self, raw: Rows, scale: nn.Module) -> None:
        self.raw = raw
        self.shape = tuple(raw.shape)
        self._scale = scale

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._scale(torch.from_numpy(np.asarray(self.raw[rows], dtype=np.float32))).numpy()


@torch.inference_mode()
def encode_all(model: EncoderModel, images: Rows, device: torch.device, channels_last: bool) -> np.ndarray:
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


def set_scale(model: MetaGMVAE, raw: Rows) -> None:
    """Give the model the statistics of the training features, (n, F), read twice in pieces of rows."""
    scale = model.scale
    if not isinstance(scale, FeatureScale | FeatureWhitening):
        return
    pieces = _even_pieces(raw) if isinstance(scale, FeatureWhitening) else _pieces(raw)
    mean = _mean(pieces)
    if isinstance(scale, FeatureScale):
        squares = torch.stack([(piece - mean).square().sum(dim=0) for piece in pieces()]).sum(dim=0)
        scale.set_statistics(mean, (squares / max(len(raw) - 1, 1)).sqrt())
    else:
        scale.set_statistics(mean, _covariance(pieces, mean))


def init_head(model: MetaGMVAE, scaled: Rows) -> None:
    """Let the model begin at the principal components of its training features, at the scale that it works on."""
    pieces = _pieces(scaled)
    mean = _mean(pieces)
    init_from_pca(model, mean, _covariance(pieces, mean))


def _pieces(rows: Rows) -> Pieces:
    """Rows in float64, so many at once, from the first to the last at each call."""
    count = len(rows)

    def pieces() -> Iterator[Tensor]:
        for first in range(0, count, ROWS):
            yield torch.as_tensor(np.asarray(rows[np.arange(first, min(first + ROWS, count))], dtype=np.float64))

    return pieces


def _even_pieces(rows: Rows) -> Pieces:
    return lambda: map(whiten, _pieces(rows)())


def _mean(pieces: Pieces) -> Tensor:
    total, count = torch.tensor(0.0), 0
    for piece in pieces():
        total, count = total + piece.sum(dim=0), count + len(piece)
    return total / count


def _covariance(pieces: Pieces, mean: Tensor) -> Tensor:
    covariance, count = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0
    for piece in pieces():
        covariance.addmm_((piece - mean).T, piece - mean)
        count += len(piece)
    return covariance / max(count - 1, 1)
