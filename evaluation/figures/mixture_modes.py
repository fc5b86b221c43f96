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
from metagmvae.training.objectives.class_posterior import fit_and_classify
from metagmvae.training.objectives.mixture import fit_mixture, init_indices

Array = np.ndarray


@dataclass(frozen=True)
class MixtureMode:
    """One component of the mixture of a set."""

    support: Array
    """Labelled images of the class, uint8 (S, C, H, W); empty for meta-training."""
    obtained: Array
    """Unlabelled images that EM assigns to the mode, the most probable first, uint8 (n, C, H, W)."""
    generated: Array
    """Decoded samples of the mode: float images in [0, 1], or uint8 images of the pool where features are decoded."""


class ModeFinder:
    """Fits the mixture of a set with a trained model and generates images from its modes.

    A model that reconstructs features generates features; each is shown by the nearest image of a pool (cosine).

    Args:
        model: a trained model.
        pool: uint8 (n, C, H, W); not used by models that reconstruct pixels.
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
        self.generated_title = "generated" if self.pool_nF is None else "nearest to decoded features"

    @torch.inference_mode()
    def training_modes(self, images: Array, train: TrainSettings) -> list[MixtureMode]:
        """Return the modes of an unlabelled set as in meta-training (Eq. 7), those with most images first."""
        generator = self._generator("training modes")
        z_1MND = self._latents(images, train.samples, generator)
        points_1PD = z_1MND.flatten(1, 2)
        rows = init_indices(points_1PD, train.components, [generator])
        mixture = fit_mixture(points_1PD, rows, train.em_iterations)
        squared_1PK = torch.cdist(points_1PD, mixture.mean_EKD).square()
        resp_1PK = torch.softmax(mixture.log_weight_EK[:, None] - 0.5 * squared_1PK, dim=2)
        resp_MK = resp_1PK.view(len(images), -1, train.components).mean(dim=1)
        modes = self._modes(images, resp_MK, mixture.mean_EKD[0], torch.ones_like(mixture.mean_EKD[0]), [])
        return sorted(modes, key=lambda mode: -len(mode.obtained))

    @torch.inference_mode()
    def test_modes(self, support: Array, query: Array, adapt: AdaptSettings) -> list[MixtureMode]:
        """Return the modes of a labelled episode after semi-supervised EM (Eq. 10), one per class.

        Args:
            support: uint8, (K, S, C, H, W).
            query: uint8, (P, C, H, W).
            adapt: settings of EM.
        """
        K, S = support.shape[:2]
        images = np.concatenate([support.reshape(K * S, *support.shape[2:]), query])
        z_1MND = self._latents(images, adapt.samples, self._generator("test modes"))
        support_1KTD = z_1MND[:, : K * S].unflatten(1, (K, S)).flatten(2, 3)
        mixture, resp_1PK = fit_and_classify(adapt, support_1KTD, z_1MND[:, K * S :])
        return self._modes(query, resp_1PK[0], mixture.mean_EKD[0], mixture.variance_EKD[0], list(support))

    @torch.inference_mode()
    def reconstruct(self, images: Array) -> Array:
        """Decode the posterior means of the images, which form one set: uint8 (n, C, H, W) -> (n, C, H, W)."""
        h_1MF = encode_images(self.model, images, self.device)[None]
        return self._decode(self.model.posterior(h_1MF)[0][0])

    def _latents(self, images: Array, samples: int, generator: torch.Generator) -> Tensor:
        mean, log_variance = self.model.posterior(encode_images(self.model, images, self.device)[None])
        noise = torch.randn(1, len(images), samples, self.model.latent, generator=generator, device=self.device)
        return sample_latents(mean, log_variance, noise)

    def _modes(
        self, images: Array, resp_MK: Tensor, mean_KD: Tensor, variance_KD: Tensor, support: list[Array]
    ) -> list[MixtureMode]:
        mode_M = resp_MK.argmax(dim=1).cpu().numpy()
        probability_M = resp_MK.max(dim=1).values.cpu().numpy()
        generator = self._generator("generated")
        modes = []
        for k, (mean, variance) in enumerate(zip(mean_KD, variance_KD, strict=True)):
            rows = np.flatnonzero(mode_M == k)
            rows = rows[np.argsort(-probability_M[rows], kind="stable")][: self.shown]
            noise = torch.randn(self.shown, len(mean), generator=generator, device=self.device)
            generated = self._decode(mean + variance.sqrt() * noise)
            modes.append(MixtureMode(support[k] if support else images[:0], images[rows], generated))
        return modes

    def _decode(self, z_nD: Tensor) -> Array:
        decoded = self.model.decode(z_nD)
        if self.pool_nF is None:
            return torch.sigmoid(decoded).cpu().numpy()
        nearest = (F.normalize(decoded, dim=1) @ F.normalize(self.pool_nF, dim=1).T).argmax(dim=1)
        return self.pool[nearest.cpu().numpy()]

    def _generator(self, purpose: str) -> torch.Generator:
        return keyed_generator(self.device, purpose, self.seed)
