"""A head that begins where a linear one would end: at the principal components of the features.

A linear VAE's objective is best at probabilistic PCA (Lucas et al., NeurIPS 2019). A posterior that starts at random is
a random projection into fewer dimensions, which loses much of what tells classes apart and takes thousands of steps
to find it again; from the components on, the objective has the set and the mixture left to learn.

Notation: F features, D latent size, W width of the set attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metagmvae.training.models.conv import FeatureDecoder
from metagmvae.training.models.feature_scaling import FLOOR
from metagmvae.training.models.meta_gmvae import MetaGMVAE


@torch.no_grad()
def init_from_pca(model: MetaGMVAE, mean_F: Tensor, covariance_FF: Tensor) -> None:
    """Set posterior and decoder to probabilistic PCA of features with these moments (float64), for any set.

    Latents are the leading components in units of what the others leave unexplained, with variance one; the decoder is
    their transpose. The layers of set attention add nothing yet: what goes into their sums is zero.
    """
    variance_F, basis_FF = torch.linalg.eigh(covariance_FF)
    variance_F, basis_FF = variance_F.flip(0).clamp_min(0), basis_FF.flip(1)
    basis_FF = basis_FF * _signs(basis_FF)
    F = len(mean_F)
    D = min(model.latent, F)
    rest = float(variance_F[D:].mean() if D < F else variance_F[-1])
    # Fewer images than dimensions leave nothing unexplained but rounding, which is no unit.
    gain = max(rest, FLOOR**2 * float(variance_F[0])) ** -0.5 if variance_F[0] > 0 else 1.0
    _encode(model, basis_FF, mean_F, D, gain)
    for block in model.attention.blocks:
        for layer in (block.output, block.outer):
            assert isinstance(layer, nn.Linear)
            _linear(layer)
    _decode(model, basis_FF[:, :D] / gain, mean_F)


def _signs(basis_FF: Tensor) -> Tensor:
    """Of each column such that its largest entry is positive: eigenvectors have none of their own."""
    return torch.gather(basis_FF, 0, basis_FF.abs().argmax(dim=0, keepdim=True)).sign()


def _encode(model: MetaGMVAE, basis_FF: Tensor, mean_F: Tensor, D: int, gain: float) -> None:
    """Features to latent means, by way of the inlet where there is one."""
    if isinstance(model.inlet, nn.Linear):
        rows = basis_FF[:, : model.inlet.out_features].T
        _linear(model.inlet, rows, -rows @ mean_F)
        _linear(model.head, gain * torch.eye(D))
    else:
        rows = gain * basis_FF[:, :D].T
        _linear(model.head, rows, -rows @ mean_F)


def _decode(model: MetaGMVAE, columns_FD: Tensor, mean_F: Tensor) -> None:
    """z and -z through the ReLUs of Table 8, whose difference is z again; the other hidden units stay as they are."""
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
    _linear(last, torch.cat([columns_FD, -columns_FD], dim=1), mean_F)


def _linear(layer: nn.Linear, corner: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Zero, but for a corner of the weights and the first biases."""
    layer.weight.zero_()
    layer.bias.zero_()
    if corner is not None:
        layer.weight[: corner.shape[0], : corner.shape[1]] = corner.to(layer.weight)
    if bias is not None:
        layer.bias[: len(bias)] = bias.to(layer.bias)
