"""Mixture modes of a set: the images that EM assigns to each mode, and images generated from it (Fig. 3).

Notation: M points, N samples, K modes, S shots, P queries, F features, D latent size, C channels, n images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.configs.schema import AdaptSettings, TrainSettings
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.meta_gmvae import MetaGMVAE, sample_latents
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.objectives.class_posterior import fit_log_posteriors
from metagmvae.training.objectives.distinct_points import init_indices
from metagmvae.training.objectives.mixture import fit_mixture

Array = np.ndarray


@dataclass(frozen=True)
class MixtureMode:
    """One component of the mixture of a set."""

    support: Array
    """Labelled images of the class, uint8 (S, C, H, W); empty for meta-training."""
    obtained: Array
    """Unlabelled images that EM assigns to the mode, the most probable first, uint8 (n, C, H, W)."""
    generated: Array
    """Decoded samples of the mode, float images in [0, 1]; or, where features are decoded, the uint8 images of the pool
    that are nearest to the decoded mean of the mode, the nearest first."""


@dataclass(frozen=True)
class FittedSet:
    """The mixture that EM fits to the latents of a set."""

    latent_TD: Tensor
    """Posterior means of the images; in an episode the support comes first."""
    mean_KD: Tensor
    variance_KD: Tensor
    resp_PK: Tensor
    """Posterior of the mode for each unlabelled image."""


class ModeFinder:
    """Fits the mixture of a set with a trained model and generates images from its modes.

    A model that reconstructs features generates no images: a mode is shown by the images of a pool whose features are
    nearest (cosine) to the decoded mean of the mode.

    Args:
        model: a trained model.
        pool: uint8 (n, C, H, W), other images than those of the sets; not used by models that reconstruct pixels.
        shown: most images of each kind in a mode.
        seed: of all random numbers.
    """

    def __init__(self, model: MetaGMVAE, pool: Array, shown: int = 8, seed: int = 0) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.pool = pool
        self.shown = shown
        self.seed = seed
        self.pool_nF = encode_images(model, pool, self.device) if model.reconstruct == "features" else None
        self.generated_title = "generated" if self.pool_nF is None else "real images nearest to the decoded mean"

    def training_modes(self, images: Array, train: TrainSettings) -> list[MixtureMode]:
        """Return the modes of an unlabelled set as in meta-training, those with most images first."""
        fitted = fit_training_set(self.model, encode_images(self.model, images, self.device), train, self.seed)
        return sorted(self._modes(images, fitted, []), key=lambda mode: -len(mode.obtained))

    def test_modes(self, support: Array, query: Array, adapt: AdaptSettings) -> list[MixtureMode]:
        """Return the modes of a labelled episode after semi-supervised EM, one per class.

        Args:
            support: uint8, (K, S, C, H, W).
            query: uint8, (P, C, H, W).
            adapt: settings of EM.
        """
        K, S = support.shape[:2]
        images = np.concatenate([support.reshape(K * S, *support.shape[2:]), query])
        h_TF = encode_images(self.model, images, self.device)
        fitted = fit_episode(self.model, h_TF[: K * S].unflatten(0, (K, S)), h_TF[K * S :], adapt, self.seed)
        return self._modes(query, fitted, list(support))

    @torch.inference_mode()
    def reconstruct(self, images: Array) -> Array:
        """Decode the posterior means of the images, which form one set: uint8 (n, C, H, W) -> (n, C, H, W)."""
        h_1MF = encode_images(self.model, images, self.device)[None]
        decoded = self.model.decode(self.model.posterior(h_1MF)[0][0])
        return self._nearest(decoded, 1)[:, 0] if self.pool_nF is not None else torch.sigmoid(decoded).cpu().numpy()

    @torch.inference_mode()
    def _modes(self, images: Array, fitted: FittedSet, support: list[Array]) -> list[MixtureMode]:
        mode_M = fitted.resp_PK.argmax(dim=1).cpu().numpy()
        probability_M = fitted.resp_PK.max(dim=1).values.cpu().numpy()
        generator = keyed_generator(self.device, "generated", self.seed)
        modes = []
        for k, (mean, variance) in enumerate(zip(fitted.mean_KD, fitted.variance_KD, strict=True)):
            rows = np.flatnonzero(mode_M == k)
            rows = rows[np.argsort(-probability_M[rows], kind="stable")][: self.shown]
            if self.pool_nF is None:
                noise = torch.randn(self.shown, len(mean), generator=generator, device=self.device)
                generated = torch.sigmoid(self.model.decode(mean + variance.sqrt() * noise)).cpu().numpy()
            else:
                generated = self._nearest(self.model.decode(mean[None]), self.shown)[0]
            modes.append(MixtureMode(support[k] if support else images[:0], images[rows], generated))
        return modes

    def _nearest(self, decoded_nF: Tensor, count: int) -> Array:
        """Return the images of the pool that are nearest to each feature vector, uint8 (n, count, C, H, W)."""
        assert self.pool_nF is not None
        cosine = F.normalize(decoded_nF, dim=1) @ F.normalize(self.pool_nF, dim=1).T
        return self.pool[cosine.topk(min(count, len(self.pool)), dim=1).indices.cpu().numpy()]


@torch.inference_mode()
def fit_training_set(model: MetaGMVAE, h_MF: Tensor, train: TrainSettings, seed: int = 0) -> FittedSet:
    """Fit the mixture of an unlabelled set as in meta-training (Eq. 7), with unit variances."""
    generator = keyed_generator(h_MF.device, "training modes", seed)
    mean_MD, z_1MND = _latents(model, h_MF, train.samples, generator)
    points_1PD = z_1MND.flatten(1, 2)
    rows = init_indices(points_1PD, train.components, [generator])
    mixture = fit_mixture(points_1PD, rows, train.em_iterations)
    squared_1PK = torch.cdist(points_1PD, mixture.mean_EKD).square()
    resp_1PK = torch.softmax(mixture.log_weight_EK[:, None] - 0.5 * squared_1PK, dim=2)
    resp_MK = resp_1PK.view(len(h_MF), -1, train.components).mean(dim=1)
    return FittedSet(mean_MD, mixture.mean_EKD[0], torch.ones_like(mixture.mean_EKD[0]), resp_MK)


@torch.inference_mode()
def fit_episode(
    model: MetaGMVAE, support_KSF: Tensor, query_PF: Tensor, adapt: AdaptSettings, seed: int = 0
) -> FittedSet:
    """Fit the mixture of a labelled episode by semi-supervised EM (Eq. 10), one component per class."""
    K, S = support_KSF.shape[:2]
    generator = keyed_generator(query_PF.device, "test modes", seed)
    h_TF = torch.cat([support_KSF.flatten(0, 1), query_PF])
    mean_TD, z_1TND = _latents(model, h_TF, adapt.samples, generator)
    support_1KTD = z_1TND[:, : K * S].unflatten(1, (K, S)).flatten(2, 3)
    mixture, log_p_1PK = fit_log_posteriors(adapt, support_1KTD, z_1TND[:, K * S :])
    return FittedSet(mean_TD, mixture.mean_EKD[0], mixture.variance_EKD[0], log_p_1PK[0].exp().to(query_PF.dtype))


def _latents(model: MetaGMVAE, h_MF: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the posterior means (M, D) of the points of a set, and samples (1, M, N, D)."""
    mean, log_variance = model.posterior(h_MF[None])
    noise = torch.randn(1, len(h_MF), samples, model.latent, generator=generator, device=h_MF.device)
    return mean[0], sample_latents(mean, log_variance, noise)
