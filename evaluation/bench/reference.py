"""A literal implementation of the paper, not optimised for time or memory. `metagmvae bench` compares against it.

All N samples are decoded, distances are computed in one tensor of points x components x D, tensors keep their default
memory layout, and the images of every episode are encoded again. The results equal those of the fast implementation.

Notation: B episodes, M points, N samples, K components or ways, S shots, P queries, D latent size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import AdaptSettings
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.conv import ConvBlock, ConvEncoder


def encode(encoder: nn.Module, x: Tensor) -> Tensor:
    """Conv4 of Table 3, layer by layer: (n, C, H, W) in [0, 1] -> (n, F)."""
    assert isinstance(encoder, ConvEncoder)
    for block in encoder.blocks:
        assert isinstance(block, ConvBlock)
        x = block.norm(block.conv(x))
        x = F.max_pool2d(F.relu(x) if block.relu else x, 2, ceil_mode=True)
    return x.flatten(1)


def log_normal(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(z; mean, diag(variance)) over the last dimension."""
    return -0.5 * ((z - mean).square() / variance + variance.log() + math.log(2 * math.pi)).sum(dim=-1)


def fit_mixture(z_BPD: Tensor, rows_BK: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """EM of Eq. 7: means (B, K, D) and weights (B, K)."""
    mean_BKD = torch.stack([z_PD[rows_K] for z_PD, rows_K in zip(z_BPD, rows_BK, strict=True)])
    weight_BK = torch.full(rows_BK.shape, 1 / rows_BK.shape[1], device=z_BPD.device)
    for _ in range(iterations):
        joint_BPK = mixture_joint(z_BPD, mean_BKD, weight_BK)
        resp_BPK = torch.softmax(joint_BPK, dim=2)
        count_BK = resp_BPK.sum(dim=1)
        mean_BKD = (resp_BPK[..., None] * z_BPD[:, :, None]).sum(dim=1) / count_BK[..., None]
        weight_BK = count_BK / count_BK.sum(dim=1, keepdim=True)
    return mean_BKD, weight_BK


def mixture_joint(z_BPD: Tensor, mean_BKD: Tensor, weight_BK: Tensor) -> Tensor:
    """log pi_k N(z; mu_k, I), (B, P, K)."""
    log_density_BPK = log_normal(z_BPD[:, :, None], mean_BKD[:, None], torch.ones_like(mean_BKD[:, None]))
    return weight_BK.log()[:, None] + log_density_BPK


def step_loss(model: MetaGMVAE, images_BMCHW: Tensor, noise_BMND: Tensor, rows_BK: Tensor, iterations: int) -> Tensor:
    """The negative of the objective of Eq. 9 on pixels, summed over points and averaged over episodes.

    `rows_BK` are the indices (below M * N) of the samples that initialise the means of EM.
    """
    B, M, N, _ = noise_BMND.shape
    x = images_BMCHW.flatten(0, 1).float() / 255
    mean_BMD, log_variance_BMD = model.posterior(encode(model.encoder, x).unflatten(0, (B, M)))
    std_BMD = torch.exp(0.5 * log_variance_BMD)
    z_BMND = mean_BMD[:, :, None] + std_BMD[:, :, None] * noise_BMND
    z_BPD = z_BMND.flatten(1, 2)
    with torch.no_grad():
        mixture = fit_mixture(z_BPD, rows_BK, iterations)
    logits = model.decode(z_BPD.flatten(0, 1))
    target = x.repeat_interleave(N, dim=0)
    pixel_loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    log_p_x = -pixel_loss.flatten(1).sum(dim=1).view(B, M, N)
    log_p_z = torch.logsumexp(mixture_joint(z_BPD, *mixture), dim=2).view(B, M, N)
    log_q = log_normal(z_BMND, mean_BMD[:, :, None], log_variance_BMD.exp()[:, :, None])
    return -(log_p_x + log_p_z - log_q).mean(dim=2).sum(dim=1).mean()


def predict_episode(
    model: MetaGMVAE, adapt: AdaptSettings, support_KSCHW: Tensor, query_PCHW: Tensor, noise_TND: Tensor
) -> Tensor:
    """Transductive class probabilities of the queries of one episode, (P, K) (Eq. 10 and 11).

    Args:
        support_KSCHW, query_PCHW: uint8 images.
        noise_TND: standard normal noise of the K * S support images, followed by the P queries.
    """
    K, S = support_KSCHW.shape[:2]
    P, N = len(query_PCHW), noise_TND.shape[1]
    x = torch.cat([support_KSCHW.flatten(0, 1), query_PCHW]).float() / 255
    h_1TF = model.scale(encode(model.encoder, x))[None]
    mean_1TD, log_variance_1TD = model.posterior(h_1TF)
    z_TND = mean_1TD[0, :, None] + torch.exp(0.5 * log_variance_1TD[0])[:, None] * noise_TND
    labelled_KLD = z_TND[: K * S].reshape(K, S * N, -1)
    query_UD = z_TND[K * S :].flatten(0, 1)
    mean_KD, variance_KD = labelled_KLD.mean(dim=1), torch.ones_like(labelled_KLD[:, 0])
    for _ in range(adapt.iterations):
        used = variance_KD if adapt.e_step == "diagonal" else torch.ones_like(variance_KD)
        resp_UK = torch.softmax(log_normal(query_UD[:, None], mean_KD, used) / adapt.temperature, dim=1)
        count_K1 = S * N + resp_UK.sum(dim=0)[:, None]
        mean_KD = (labelled_KLD.sum(dim=1) + (resp_UK[..., None] * query_UD[:, None]).sum(dim=0)) / count_K1
        spread_UKD = resp_UK[..., None] * (query_UD[:, None] - mean_KD).square()
        variance_KD = ((labelled_KLD - mean_KD[:, None]).square().sum(dim=1) + spread_UKD.sum(dim=0)) / count_K1
    used = variance_KD if adapt.final_covariance == "diagonal" else torch.ones_like(variance_KD)
    posterior_UK = torch.softmax(log_normal(query_UD[:, None], mean_KD, used) / adapt.temperature, dim=1)
    return posterior_UK.view(P, N, K).mean(dim=1)
