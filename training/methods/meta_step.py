"""Meta-training of Meta-GMVAE: the loss of a step, and the method as a whole.

A step module, batch -> (loss, metrics), has two parts. `prepare` copies the batch to the device and draws all random
numbers; `compute` is a function of these tensors with fixed shapes that reads no value of the device back, so it can be
captured as a CUDA graph. Random numbers come from generators keyed by (seed, purpose, episode), never from the global
state: a step is the same after a resume, and an episode is the same on any rank and with any number of ranks.

Notation: b = B / number of ranks episodes, M data points per episode, N Monte Carlo samples, P = M * N points, D latent
size, F feature size, n images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.configs.schema import ModelSettings, Settings, TrainSettings
from metagmvae.pipelines.records import Rows, SetBatch
from metagmvae.pipelines.sampling.factory import unlabelled_sets
from metagmvae.pipelines.sampling.stream import Stream
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.augment.view import View
from metagmvae.training.device.memory_format import channels_last
from metagmvae.training.device.precision import autocast
from metagmvae.training.device.seeding import episode_generators, to_device
from metagmvae.training.methods.frozen_features import init_from_features
from metagmvae.training.methods.meta_gmvae import MetaGMVAE, sample_latents
from metagmvae.training.methods.method import Method, MethodData
from metagmvae.training.objectives.distinct_points import MixtureError, first_distinct, random_order, too_few_points
from metagmvae.training.objectives.elbo import Likelihood, Prior, lower_bound, objective, standard_normal
from metagmvae.training.objectives.mixture import fit_mixture

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
        prior, too_few = self.fit_prior(z_BMND.detach().flatten(1, 2), order_BP)
        with self._autocast(data.device):
            decoded = model.decode(z_BMND[:, :, : settings.decode_samples].flatten(0, 2))
        likelihood: Likelihood = model.variance if self.on_features else "bernoulli"
        terms = lower_bound(x, decoded, z_BMND, noise_BMND, log_variance_BMD, prior, likelihood)
        metrics = {name: value.detach().mean() for name, value in terms._asdict().items()}
        loss = -objective(terms, settings.objective_scale, settings.beta)
        # A loss that is not finite stops the training without an update; `explain_failure` then tells the reason.
        self.too_few = too_few
        loss = loss.masked_fill(too_few, float("nan"))
        return loss, {**metrics, "elbo": terms.elbo.detach().mean()}

    def fit_prior(self, z_BPD: Tensor, order_BP: Tensor) -> tuple[Prior, Tensor]:
        """The prior of each episode, a constant of the objective, and whether an episode has too few distinct points.

        EM fits the mixture psi* to the samples (Eq. 7). Without episodic training it is N(0, I) (`train.prior`). A
        method with another prior overrides this, and `MetaGMVAE.classify_latents`.

        Args:
            z_BPD: samples, without gradient.
            order_BP: a random order of the points of each episode, in which the means are chosen.
        """
        settings = self.settings
        if settings.prior == "normal":
            return standard_normal(z_BPD), torch.zeros((), dtype=torch.bool, device=z_BPD.device)
        init_BK, enough_B = first_distinct(z_BPD, order_BP, settings.components)
        mixture = fit_mixture(z_BPD, init_BK, settings.em_iterations)
        return mixture, ~enough_B.all() & z_BPD.sum().isfinite()

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
            inputs = channels_last(inputs)
        with self._autocast(data.device):
            return x, self.model.encode_images(inputs).unflatten(0, data.shape[:2])

    def _views(self, sets: Tensor, episodes: np.ndarray) -> Tensor:
        """A random view of each image, (b, M, C, H, W) -> (b*M, C, H, W), keyed by episode."""
        assert self.view is not None
        generators = episode_generators(sets.device, self.settings.seed, "denoise", episodes)
        return torch.cat([self.view(images, generator) for images, generator in zip(sets, generators, strict=True)])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return autocast(device, self.settings.precision)


class MetaGMVAEMethod(Method):
    """Meta-GMVAE on images, or on the features of a frozen encoder.

    Args:
        make_model: model settings and image shape -> a new model; a subclass may classify by another mixture.
        make_step: model, training settings and view -> the step module; a subclass may have another prior.
    """

    reads_sequentially = True

    def __init__(
        self,
        make_model: Callable[[ModelSettings, tuple[int, int, int]], MetaGMVAE] = MetaGMVAE,
        make_step: Callable[[Any, TrainSettings, View | None], MetaStep] = MetaStep,
    ) -> None:
        self.make_model = make_model
        self.make_step = make_step

    def build(self, model: ModelSettings, method: MethodSettings, image_shape: tuple[int, int, int]) -> MetaGMVAE:
        """A new model."""
        return self.make_model(model, image_shape)

    def step(self, model: MetaGMVAE, settings: Settings) -> nn.Module:
        """The step module."""
        view = build_view(settings.pretrain, model) if settings.train.denoise else None
        return self.make_step(model, settings.train, view)

    def stream(self, data: MethodData, settings: Settings, **position: Any) -> Stream:
        """Unlabelled sets."""
        train = settings.train
        return unlabelled_sets(data.rows, batch=train.batch, set_size=train.set_size, **position)

    def images_per_step(self, settings: Settings) -> int:
        """Images of all episodes."""
        return settings.train.batch * settings.train.set_size

    def on_features(self, settings: Settings) -> bool:
        """Whether features are reconstructed."""
        return settings.model.reconstruct == "features"

    def start(self, model: MetaGMVAE, settings: Settings, rows: Rows) -> None:
        """PCA initialisation, if the settings ask for it."""
        if settings.train.start == "components":
            init_from_features(model, rows)
