"""Step modules, batch -> (loss, terms): what the loop minimises in each stage.

All randomness of a step comes from generators keyed by (seed, purpose, episode or step), never from global
state: a step gives the same numbers after a resume, and an episode on any rank and in any world size. Views
are keyed by step and rank: with another world size they are other views.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.configs.schema import PretrainSettings, TrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.device import distributed
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import keyed_generator, to_device
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.models.meta_gmvae import MetaGMVAE, sample_latents
from metagmvae.training.objectives.elbo import Likelihood, lower_bound, objective
from metagmvae.training.objectives.mixture import fit_mixture, init_indices
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.trainer.builders import View, build_view

StepMetrics = dict[str, Tensor]


class MetaStep(nn.Module):
    """One evaluation of the objective (Eq. 9) on b episodes of this rank; the loss is its negative.

    Sets of images (uint8) go through the encoder. Where features are reconstructed the sets are features
    already (float32, from the frozen encoder) and the encoder takes no part.

    Args:
        model: that is trained.
        settings: of the stage.
        view: of each image, by which the posterior sees it (`train.denoise`); None: the image itself.
    """

    def __init__(self, model: MetaGMVAE, settings: TrainSettings, view: View | None = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.view = view
        self.on_features = model.reconstruct == "features"
        model.encoder.requires_grad_(not self.on_features)

    def train(self, mode: bool = True) -> MetaStep:
        super().train(mode)
        self.model.encoder.train(mode and not self.on_features)
        return self

    def forward(self, batch: SetBatch) -> tuple[Tensor, StepMetrics]:
        settings, model = self.settings, self.model
        data = to_device(batch.images, next(model.parameters()).device)
        M = data.shape[1]
        x, h_BMF = self._features(data, batch.episodes)
        generators = [keyed_generator(data.device, settings.seed, "meta", int(e)) for e in batch.episodes]
        noise_BMND = torch.stack(
            [torch.randn(M, settings.samples, model.latent, generator=g, device=data.device) for g in generators]
        )
        with self._autocast(data.device):
            mean_BMD, log_variance_BMD = model.posterior(h_BMF)
        z_BMND = sample_latents(mean_BMD, log_variance_BMD, noise_BMND)
        points_BPD = z_BMND.detach().flatten(1, 2)
        rows = init_indices(points_BPD, settings.components, generators)
        mixture = fit_mixture(points_BPD, rows, settings.em_iterations)
        with self._autocast(data.device):
            decoded = model.decode(z_BMND[:, :, : settings.decode_samples].flatten(0, 2))
        likelihood: Likelihood = model.variance if self.on_features else "bernoulli"
        terms = lower_bound(x, decoded, z_BMND, noise_BMND, log_variance_BMD, mixture, likelihood)
        per_point = {name: value.detach().mean() for name, value in terms._asdict().items()}
        loss = -objective(terms, settings.objective_scale, settings.beta)
        return loss, {**per_point, "elbo": terms.elbo.detach().mean()}

    def _features(self, data: Tensor, episodes: np.ndarray) -> tuple[Tensor, Tensor]:
        """What is reconstructed, (b*M, ...), and what the set encoder sees, (b, M, F)."""
        if self.on_features:
            return data.flatten(0, 1), data
        x = self.model.scale_images(data.flatten(0, 1))
        seen = x if self.view is None else self._views(x.unflatten(0, data.shape[:2]), episodes)
        if self.settings.channels_last:
            seen = seen.contiguous(memory_format=torch.channels_last)
        with self._autocast(data.device):
            return x, self.model.encode_images(seen).unflatten(0, data.shape[:2])

    def _views(self, sets: Tensor, episodes: np.ndarray) -> Tensor:
        """A view of each image of each set, (b, M, C, H, W) -> (b*M, C, H, W); those of an episode by its number."""
        assert self.view is not None
        generators = [keyed_generator(sets.device, self.settings.seed, "denoise", int(e)) for e in episodes]
        return torch.cat([self.view(images, generator) for images, generator in zip(sets, generators, strict=True)])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return autocast(device, self.settings.precision)


class ContrastiveStep(nn.Module):
    """NT-Xent on two views of each image of this rank, negatives from all ranks.

    Batch normalisation sees the views of this rank only: with W ranks its statistics are those of a W-th of the
    batch, as in SimCLR without "global BN"; loss and gradient are otherwise those of one process.

    Args:
        model: whose encoder is trained.
        projector: head between features and loss; the identity for none.
        settings: seed, precision and memory format.
        pretrain: temperature and kind of views.
    """

    def __init__(
        self, model: EncoderModel, projector: nn.Module, settings: TrainSettings, pretrain: PretrainSettings
    ) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.projector = projector
        self.settings = settings
        self.temperature = pretrain.temperature
        self.view = build_view(pretrain, model)

    def forward(self, images: object, step: int) -> tuple[Tensor, StepMetrics]:
        device = next(self.encoder.parameters()).device
        x = EncoderModel.scale_images(to_device(images, device))
        generator = keyed_generator(device, self.settings.seed, "views", step, distributed.rank())
        views = torch.cat([self.view(x, generator), self.view(x, generator)])
        if self.settings.channels_last:
            views = views.contiguous(memory_format=torch.channels_last)
        with autocast(device, self.settings.precision):
            h = self.projector(self.encoder(views))
        first, second = h.chunk(2)
        loss = nt_xent(first, second, self.temperature, distributed.gather, distributed.rank())
        return loss, {}
