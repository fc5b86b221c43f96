"""Frozen features as the data of meta-training: their scaling, and the PCA initialisation of the model.

Notation: n features of size F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.pipelines.records import Rows
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.pca_init import init_from_pca
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening, ViewWhitening
from metagmvae.training.models.meta_learner import MetaLearner

CHUNK = 1024
"""Rows processed at a time."""
Chunks = Callable[[], Iterator[Tensor]]
"""Iterates over all rows, float64 (<= CHUNK, F), from the first row on at each call."""
VIEW_IMAGES = 8192
"""Training images whose views give the covariance of `ViewWhitening`. They are the first ones: the images of a dataset
stand in random order. Half as many gave the same accuracy."""


class ScaledRows:
    """Features scaled for the model: `data[rows] -> float32 (n, F)`, on the CPU."""

    def __init__(self, raw: Rows, scale: nn.Module) -> None:
        self.raw = raw
        self.shape = tuple(raw.shape)
        self._scale = scale

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._scale(torch.from_numpy(np.asarray(self.raw[rows], dtype=np.float32))).numpy()


def fit_feature_scaling(model: MetaLearner, raw: Rows, encode_views: Callable[[int], np.ndarray] | None = None) -> None:
    """Set the statistics of the model's feature scaling to those of the raw training features.

    Args:
        model: whose scaling is fitted.
        raw: features of the training images, (n, F).
        encode_views: returns the raw features of one random view of each of the first training images, (count, F);
            only called, and then needed, for `ViewWhitening`.
    """
    scale = model.scale
    if isinstance(scale, ViewWhitening):
        assert encode_views is not None
        scale.set_statistics(_mean(_transformed(scale, raw)), _covariance_within_images(scale, raw, encode_views))
    elif isinstance(scale, FeatureWhitening):
        scale.set_statistics(*_mean_and_covariance(_transformed(scale, raw)))
    elif isinstance(scale, FeatureScale):
        chunks = _chunks(raw)
        mean = _mean(chunks)
        squares = torch.stack([(chunk - mean).square().sum(dim=0) for chunk in chunks()]).sum(dim=0)
        scale.set_statistics(mean, (squares / max(len(raw) - 1, 1)).sqrt())


def init_from_features(model: MetaGMVAE, scaled: Rows) -> None:
    """Initialise posterior and decoder from a PCA of the scaled training features, (n, F)."""
    init_from_pca(model, *_mean_and_covariance(_chunks(scaled)))


def _covariance_within_images(scale: ViewWhitening, raw: Rows, encode_views: Callable[[int], np.ndarray]) -> Tensor:
    """Covariance of two views of an image, the image itself and a random view, about their mean: (F, F) float64."""
    count = min(VIEW_IMAGES, len(raw))
    views, images = (_transformed(scale, h)() for h in (encode_views(count), raw[np.arange(count)]))
    difference = torch.cat(list(views)) - torch.cat(list(images))
    # The deviations from the mean of two views are half of their difference; the divisor is 2 - 1 for each image.
    return difference.T @ difference / (2 * count)


def _transformed(scale: FeatureWhitening, raw: Rows) -> Chunks:
    return lambda: map(scale.transform, _chunks(raw)())


def _chunks(data: Rows) -> Chunks:
    count = len(data)

    def chunks() -> Iterator[Tensor]:
        for first in range(0, count, CHUNK):
            yield torch.as_tensor(np.asarray(data[np.arange(first, min(first + CHUNK, count))], dtype=np.float64))

    return chunks


def _mean(chunks: Chunks) -> Tensor:
    total, count = torch.tensor(0.0), 0
    for chunk in chunks():
        total, count = total + chunk.sum(dim=0), count + len(chunk)
    return total / count


def _mean_and_covariance(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """(F,) and (F, F), with the divisor n - 1."""
    mean = _mean(chunks)
    covariance, count = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0
    for chunk in chunks():
        covariance.addmm_((chunk - mean).T, chunk - mean)
        count += len(chunk)
    return mean, covariance / max(count - 1, 1)
