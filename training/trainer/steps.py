"""Step modules, batch -> (loss, terms): the loss that the training loop minimises in each stage.

Each has two parts. `prepare` copies the batch to the device and draws all random numbers; `compute` is a function of
these tensors with fixed shapes that reads no value of the device back, so it can be captured as a CUDA graph.

Random numbers of a step come from generators keyed by (seed, purpose, episode), never from the global state: a step is
the same after a resume, and an episode is the same on any rank and with any number of ranks. The views of contrastive
pre-training are keyed by (seed, step, rank), so they change with the number of ranks.

Notation: b = B / number of ranks episodes, M data points per episode, N Monte Carlo samples, P = M * N points, D latent
size, F feature size, n images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import PretrainSettings, TrainSettings
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.augment.view import View
from metagmvae.training.device import distributed
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import episode_generators, keyed_generator, to_device
from metagmvae.training.methods.meta_gmvae import MetaGMVAE, sample_latents
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.objectives.elbo import Likelihood, lower_bound, objective
from metagmvae.training.objectives.mixture import (
    MixtureError,
    first_distinct,
    fit_mixture,
    random_order,
    too_few_points,
)
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.objectives.prototypes import prototype_loss

StepMetrics = dict[str, Tensor]
"""Scalars without gradient, for the metric lines."""


class MetaStep(nn.Module):
    """Meta-training: the negative objective (Eq. 9 of Lee et al., ICLR 2021) of this rank's b episodes.

    The data are sets of uint8 images, (b, M, C, H, W), or, where the model reconstructs features, sets of scaled
    features of the frozen encoder, float32 (b, M, F); the encoder is then not used.

    Args:
        model: the model to train.
        settings: of the stage.
        view: denoising (`train.denoise`): the posterior sees this random view of each image, and the decoder
            reconstructs the image itself. None: the posterior sees the image.
    """

    def __init__(self, model: MetaGMVAE, settings: TrainSettings, view: View | None = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.view = view
        self.on_features = model.reconstruct == "features"
        self.too_few: Tensor | None = None
        model.encoder.requires_grad_(not self.on_features)

    def train(self, mode: bool = True) -> MetaStep:
        super().train(mode)
        self.model.encoder.train(mode and not self.on_features)
        return self

    def forward(self, batch: SetBatch) -> tuple[Tensor, StepMetrics]:
        """Loss, and the means over data points of the terms of the lower bound, in nats."""
        return self.compute(*self.prepare(batch))

    def prepare(self, batch: SetBatch) -> tuple[Tensor, ...]:
        """Data, noise (b, M, N, D), random orders of the points (b, P), and views (b*M, C, H, W) for denoising."""
        settings = self.settings
        data = to_device(batch.images, next(self.model.parameters()).device)
        M, D = data.shape[1], self.model.latent
        generators = episode_generators(data.device, settings.seed, "meta", batch.episodes)
        noise_BMND = torch.stack(
            [torch.randn(M, settings.samples, D, generator=g, device=data.device) for g in generators]
        )
        order_BP = random_order(M * settings.samples, generators)
        if self.view is None:
            return data, noise_BMND, order_BP
        return data, noise_BMND, order_BP, self._views(self.model.scale_images(data), batch.episodes)

    def compute(
        self, data: Tensor, noise_BMND: Tensor, order_BP: Tensor, views: Tensor | None = None
    ) -> tuple[Tensor, StepMetrics]:
        """Loss and terms from the results of `prepare`."""
        settings, model = self.settings, self.model
        x, h_BMF = self._targets_and_features(data, views)
        with self._autocast(data.device):
            mean_BMD, log_variance_BMD = model.posterior(h_BMF)
        z_BMND = sample_latents(mean_BMD, log_variance_BMD, noise_BMND)
        # EM in the step (Eq. 7): psi* is a constant of the objective.
        z_BPD = z_BMND.detach().flatten(1, 2)
        init_BK, enough_B = first_distinct(z_BPD, order_BP, settings.components)
        mixture = fit_mixture(z_BPD, init_BK, settings.em_iterations)
        with self._autocast(data.device):
            decoded = model.decode(z_BMND[:, :, : settings.decode_samples].flatten(0, 2))
        likelihood: Likelihood = model.variance if self.on_features else "bernoulli"
        terms = lower_bound(x, decoded, z_BMND, noise_BMND, log_variance_BMD, mixture, likelihood)
        metrics = {name: value.detach().mean() for name, value in terms._asdict().items()}
        loss = -objective(terms, settings.objective_scale, settings.beta)
        # A loss that is not finite stops the training without an update; `explain_failure` then tells the reason.
        self.too_few = ~enough_B.all() & z_BPD.sum().isfinite()
        loss = loss.masked_fill(self.too_few, float("nan"))
        return loss, {**metrics, "elbo": terms.elbo.detach().mean()}

    def explain_failure(self) -> None:
        """Raise the reason of a loss that is not finite, if the last step had fewer distinct points than components.

        Raises:
            MixtureError: it had.
        """
        if self.too_few is not None and self.too_few.item():
            raise MixtureError(too_few_points(self.settings.components))

    def _targets_and_features(self, data: Tensor, views: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reconstruction targets, (b*M, ...), and the features that the set encoder sees, (b, M, F)."""
        if self.on_features:
            return data.flatten(0, 1), data
        x = self.model.scale_images(data.flatten(0, 1))
        inputs = x if views is None else views
        if self.settings.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with self._autocast(data.device):
            return x, self.model.encode_images(inputs).unflatten(0, data.shape[:2])

    def _views(self, sets: Tensor, episodes: np.ndarray) -> Tensor:
        """A random view of each image, (b, M, C, H, W) -> (b*M, C, H, W), keyed by episode."""
        assert self.view is not None
        generators = episode_generators(sets.device, self.settings.seed, "denoise", episodes)
        return torch.cat([self.view(images, generator) for images, generator in zip(sets, generators, strict=True)])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return autocast(device, self.settings.precision)


class ContrastiveStep(nn.Module):
    """Contrastive pre-training on views of the images of this rank, with negatives from all ranks.

    `nt-xent`: two views of each image (SimCLR). `prototypes`: the image itself and Q views of it (ProtoCLR).

    Batch normalisation sees this rank's views only, as in SimCLR without "global BN". Otherwise loss and gradient equal
    those of one process.

    Args:
        model: the model whose encoder is trained.
        projector: projection head between features and loss; the identity for none.
        settings: seed, precision and memory format.
        pretrain: objective, temperature and views.
    """

    def __init__(
        self, model: EncoderModel, projector: nn.Module, settings: TrainSettings, pretrain: PretrainSettings
    ) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.projector = projector
        self.settings = settings
        self.pretrain = pretrain
        self.view = build_view(pretrain, model)

    def forward(self, images: object, step: int) -> tuple[Tensor, StepMetrics]:
        """uint8 images (n, C, H, W) and the number of the step -> loss and no further metrics."""
        return self.compute(*self.prepare(images, step))

    def prepare(self, images: object, step: int) -> tuple[Tensor, ...]:
        """All that is encoded, (v * n, C, H, W): two views of each image, or the images and Q views of each."""
        device = next(self.encoder.parameters()).device
        x = EncoderModel.scale_images(to_device(images, device))
        generator = keyed_generator(device, self.settings.seed, "views", step, distributed.rank())
        prototypes = self.pretrain.objective == "prototypes"
        views = [self.view(x, generator) for _ in range(self.pretrain.query_views if prototypes else 2)]
        if prototypes:
            size = views[0].shape[-2:]
            same_size = x.shape[-2:] == size
            views.insert(0, x if same_size else F.interpolate(x, size, mode="bilinear", antialias=True))
        inputs = torch.cat(views)
        return (inputs.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else inputs,)

    def compute(self, inputs: Tensor) -> tuple[Tensor, StepMetrics]:
        """Loss from the result of `prepare`."""
        with autocast(inputs.device, self.settings.precision):
            h = self.projector(self.encoder(inputs))
        ranks = (self.pretrain.temperature, distributed.all_gather, distributed.rank())
        if self.pretrain.objective == "prototypes":
            n = len(h) // (1 + self.pretrain.query_views)
            return prototype_loss(h[:n], h[n:], *ranks), {}
        first, second = h.chunk(2)
        return nt_xent(first, second, *ranks), {}
