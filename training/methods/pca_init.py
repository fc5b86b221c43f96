"""Initialise the posterior and the decoder from a PCA of the features.

The objective of a linear VAE is maximal at probabilistic PCA (Lucas et al., NeurIPS 2019). A randomly initialised
posterior is a random projection to fewer dimensions: it loses much of what separates the classes, and needs thousands
of steps to recover it. From a PCA, training only has to learn the set attention and the mixture.

Notation: F feature size, D latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.conv import FeatureDecoder
from metagmvae.training.models.feature_scaling import FLOOR


@torch.no_grad()
def init_from_pca(model: MetaGMVAE, mean_F: Tensor, covariance_FF: Tensor) -> None:
    """Set posterior and decoder to probabilistic PCA of features with this mean and covariance (float64).

    Latent means are the leading principal components divided by the standard deviation of the discarded ones, latent
    variances are 1, and the decoder is the transpose. The set-attention layers start as the identity, because the last
    layers of their residual branches are zero; the latents of an image do not depend on its set yet.
    """
    variance_F, basis_FF = torch.linalg.eigh(covariance_FF)
    variance_F, basis_FF = variance_F.flip(0).clamp_min(0), basis_FF.flip(1)
    basis_FF = basis_FF * _signs(basis_FF)
    F = len(mean_F)
    D = min(model.latent, F)
    discarded = float(variance_F[D:].mean() if D < F else variance_F[-1])
    # With fewer images than dimensions the discarded variance is rounding error: the floor keeps latents finite.
    gain = max(discarded, FLOOR**2 * float(variance_F[0])) ** -0.5 if variance_F[0] > 0 else 1.0
    _set_posterior(model, basis_FF, mean_F, D, gain)
    for block in model.attention.blocks:
        for layer in (block.output, block.outer):
            assert isinstance(layer, nn.Linear)
            _set_linear(layer)
    _set_decoder(model, basis_FF[:, :D] / gain, mean_F)


def _signs(basis_FF: Tensor) -> Tensor:
    """Sign of each column's largest entry, which makes the arbitrary signs of eigenvectors reproducible."""
    return torch.gather(basis_FF, 0, basis_FF.abs().argmax(dim=0, keepdim=True)).sign()


def _set_posterior(model: MetaGMVAE, basis_FF: Tensor, mean_F: Tensor, D: int, gain: float) -> None:
    """Linear map from features to latent means, through the input projection if there is one."""
    if isinstance(model.inlet, nn.Linear):
        rows = basis_FF[:, : model.inlet.out_features].T
        _set_linear(model.inlet, rows, -rows @ mean_F)
        _set_linear(model.head, gain * torch.eye(D))
    else:
        rows = gain * basis_FF[:, :D].T
        _set_linear(model.head, rows, -rows @ mean_F)


def _set_decoder(model: MetaGMVAE, columns_FD: Tensor, mean_F: Tensor) -> None:
    """Linear map from latents to features: relu(z) - relu(-z) = z passes the ReLUs of Table 8.

    The hidden units beyond 2D keep their random weights.
    """
    assert isinstance(model.decoder, FeatureDecoder)
    first, second, last = (layer for layer in model.decoder.mlp if isinstance(layer, nn.Linear))
    D = columns_FD.shape[1]
    eye = torch.eye(D).to(first.weight)
    first.weight[: 2 * D] = 0
    first.weight[: 2 * D, :D] = torch.cat([eye, -eye])
    first.bias[: 2 * D] = 0
    second.weight[: 2 * D] = 0
    second.weight[: 2 * D, : 2 * D] = torch.eye(2 * D).to(first.weight)
    second.bias[: 2 * D] = 0
    _set_linear(last, torch.cat([columns_FD, -columns_FD], dim=1), mean_F)


def _set_linear(layer: nn.Linear, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Set the leading block of the weights and the leading biases; everything else becomes zero."""
    layer.weight.zero_()
    layer.bias.zero_()
    if weight is not None:
        layer.weight[: weight.shape[0], : weight.shape[1]] = weight.to(layer.weight)
    if bias is not None:
        layer.bias[: len(bias)] = bias.to(layer.bias)
