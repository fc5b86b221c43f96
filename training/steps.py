"""Step modules, batch -> (loss, terms): what the loop minimises in each stage.

All randomness of a step comes from generators keyed by (seed, purpose, episode or step), never from global
state: a step gives the same numbers after a resume, on any rank, and in any world size.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from configs.schema import TrainSettings
from pipelines.records import SetBatch
from training import parallel
from training.augment import view
from training.contrastive import nt_xent
from training.meta_gmvae import MetaGMVAE, sample_latents
from training.mixture import fit_mixture, initial_rows
from training.objective import lower_bound, objective

Terms = dict[str, Tensor]


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose stream is a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def to_device(images: object, device: torch.device) -> Tensor:
    """uint8 array -> uint8 tensor on the device; a third of the traffic of sending floats."""
    return torch.as_tensor(images).to(device, non_blocking=True)


class MetaStep(nn.Module):
    """One evaluation of the objective (Eq. 9) on b episodes of this rank; the loss is its negative."""

    def __init__(self, model: MetaGMVAE, settings: TrainSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        if settings.freeze_encoder:
            model.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> MetaStep:
        super().train(mode)
        if self.settings.freeze_encoder:
            self.model.encoder.eval()
        return self

    def forward(self, batch: SetBatch) -> tuple[Tensor, Terms]:
        settings, model = self.settings, self.model
        device = next(model.parameters()).device
        images = to_device(batch.images, device)
        b, M = images.shape[:2]
        x = model.scale_images(images.flatten(0, 1))
        if settings.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        generators = [keyed_generator(device, settings.seed, "meta", int(e)) for e in batch.episodes]
        noise_BMND = torch.stack(
            [torch.randn(M, settings.samples, model.latent, generator=g, device=device) for g in generators]
        )
        with self._autocast(device):
            h_BMF = model.encode_images(x).unflatten(0, (b, M))
            mean_BMD, log_variance_BMD = model.posterior(h_BMF)
        z_BMND = sample_latents(mean_BMD, log_variance_BMD, noise_BMND)
        points_BPD = z_BMND.detach().flatten(1, 2)
        rows = initial_rows(points_BPD, settings.components, generators)
        mixture = fit_mixture(points_BPD, rows, settings.em_iterations)
        with self._autocast(device):
            logits = model.decode(z_BMND[:, :, : settings.decode_samples].flatten(0, 2))
        terms = lower_bound(x, logits, z_BMND, noise_BMND, log_variance_BMD, mixture)
        per_point = {name: value.detach().mean() for name, value in terms._asdict().items()}
        loss = -objective(terms, settings.objective_scale)
        return loss, {**per_point, "elbo": terms.elbo.detach().mean()}

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class ContrastiveStep(nn.Module):
    """NT-Xent on two views of each image of this rank, negatives from all ranks."""

    def __init__(self, model: MetaGMVAE, settings: TrainSettings, temperature: float) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.settings = settings
        self.temperature = temperature

    def forward(self, images: object, step: int) -> tuple[Tensor, Terms]:
        device = next(self.encoder.parameters()).device
        x = MetaGMVAE.scale_images(to_device(images, device))
        generator = keyed_generator(device, self.settings.seed, "views", step, parallel.rank())
        views = torch.cat([view(x, generator), view(x, generator)])
        if self.settings.channels_last:
            views = views.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            h = self.encoder(views)
        first, second = h.chunk(2)
        loss = nt_xent(first, second, self.temperature, parallel.gather, parallel.rank())
        return loss, {}
