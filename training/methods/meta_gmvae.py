"""Meta-GMVAE: set-conditioned posterior q(z | x, D), decoder p(x | z), and adaptation (Lee et al., ICLR 2021).

Adaptation (section 3.3) takes the support and the queries of an episode as the set D, draws latents of each image, and
fits the classes to them by semi-supervised EM (`training.objectives.class_posterior`, Eq. 10 and 11).

Notation: B sets, M data points per set, N Monte Carlo samples, n images, C x H x W image shape, F feature size,
D latent size; in q(z | x, D), D is the set. E episodes, K classes, T labelled images, P queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import AdaptSettings, ModelSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.conv import ConvDecoder, FeatureDecoder
from metagmvae.training.models.encoders import configured_encoder
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening, ViewWhitening
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.models.set_attention import SetAttention
from metagmvae.training.objectives.class_posterior import classify_latents
from metagmvae.training.objectives.episode_features import adapt_features

MAX_LATENT_VALUES = {"cpu": 2**23, "cuda": 2**26}
"""Maximum number of latent values (points x samples x D) in a batch, by device type; about four such arrays exist.
On a CPU small batches are the fast ones, because they fit its caches (a quarter faster than 2^25, measured)."""

SCALES: dict[str, type[nn.Module]] = {
    "standard": FeatureScale,
    "whitened": FeatureWhitening,
    "view-whitened": ViewWhitening,
}
"""Scaling of features that are reconstructed, by `model.features`; `raw` has none."""


class MetaGMVAE(MetaLearner):
    """Variational autoencoder whose posterior depends on the whole set (Tables 3, 4, 7 and 8).

    The prior is no part of it: `training.objectives.mixture` fits the mixture to each episode. Names of submodules are
    keys of stored checkpoints.
    """

    has_background = True

    def __init__(self, settings: ModelSettings, image_shape: tuple[int, int, int]) -> None:
        super().__init__(configured_encoder(settings, image_shape), image_shape)
        width, self.latent = settings.width, settings.latent
        # Conv4 on 28x28 images has F = 256, the width of the set encoder in Table 3; other sizes need a projection.
        self.inlet = nn.Identity() if self.feature_dim == width else nn.Linear(self.feature_dim, width)
        self.attention = SetAttention(
            width,
            settings.heads,
            settings.layers,
            settings.attention_scale,
            settings.attention_block,
            settings.attention_activation,
        )
        self.head = nn.Linear(width, self.latent + (self.latent if settings.posterior == "diagonal" else 1))
        self.reconstruct, self.variance = settings.reconstruct, settings.variance
        self.scale: nn.Module = nn.Identity()
        self.decoder: nn.Module
        if settings.reconstruct == "features":
            if settings.features in SCALES:
                self.scale = SCALES[settings.features](self.feature_dim)
            final_relu = settings.rectified and settings.features == "raw"
            self.decoder = FeatureDecoder(self.feature_dim, self.latent, final_relu=final_relu)
        else:
            self.decoder = ConvDecoder(image_shape, settings.channels, self.latent, width)

    @property
    def compiled_networks(self) -> list[nn.Module]:
        """Encoder, set encoder and decoder."""
        return [self.encoder, self.attention, self.decoder]

    def scale_features(self, h: Tensor) -> Tensor:
        """Raw features of the encoder, f(x) of Eq. 5, (n, F) -> the features that the model works on, (n, F).

        The same, except that features to be reconstructed are scaled (`training.models.feature_scaling`).
        """
        return self.scale(h)

    def posterior(self, h_BMF: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5: features of whole sets, (B, M, F) -> mean and log variance of q(z_j | x_j, D), (B, M, D) each.

        The variance is diagonal as in Eq. 5 and Tables 3 and 7, or isotropic as the paper's text says (`posterior`).
        """
        hidden = at_least_float32(self.head(self.attention(self.inlet(h_BMF))))
        mean_BMD, log_variance = hidden[..., : self.latent], hidden[..., self.latent :]
        return mean_BMD, log_variance.expand_as(mean_BMD)

    def decode(self, z: Tensor) -> Tensor:
        """p(x | z): latents (n, D) -> logits of Bernoulli means (n, C, H, W), or means of the features (n, F)."""
        return self.decoder(z)

    def log_posteriors(
        self,
        adapt: AdaptSettings,
        support_ET: Tensor,
        label_T: Tensor,
        query_EP: Tensor,
        *,
        mode: PredictionMode,
        seed_by_episode: Sequence[int],
        background: float | None = None,
    ) -> Tensor:
        """Return log p(y | x, D) of every query (Eq. 10 and 11), as `MetaLearner.log_posteriors`, from features.

        Transductive is the protocol of the paper: the attention and EM see the support and all queries of an episode.
        Inductive: each query is classified alone, in a set of the support and this query; the class means and variances
        come from the support only, from its latents or, without any set, from its features (`AdaptSettings.inductive`).
        The probabilities of a query depend neither on other queries, nor on its position among them, nor on the order
        of the classes and of the support images.

        Raises:
            DataError: whitening or diffusion is asked for, and the model does not scale its features.
        """
        for key in ("whitening", "diffusion"):
            if (value := getattr(adapt, key)) and isinstance(self.scale, nn.Identity):
                raise DataError(f"adapt.{key} ({value:g}): the model has no scaled features; set it to 0")
        transductive = mode == "transductive"
        support_ET, query_EP = adapt_features(adapt, support_ET, label_T, query_EP, transductive=transductive)
        if mode == "inductive" and adapt.inductive == "features":
            support_ETNF, query_EPNF = support_ET[:, :, None], query_EP[:, :, None]
            return self.classify_latents(
                adapt, support_ETNF, label_T, query_EPNF, fit_on_queries=False, background=background
            )
        if mode == "inductive":
            episodes = zip(support_ET, query_EP, seed_by_episode, strict=True)
            return torch.stack([self._classify_alone(adapt, *item, label_T, background) for item in episodes])
        points, device = support_ET.shape[1] + query_EP.shape[1], query_EP.device
        noise = torch.empty(len(seed_by_episode), points, adapt.samples, self.latent, device=device)
        for noise_MND, seed in zip(noise, seed_by_episode, strict=True):
            latent_noise(self, adapt, points, seed, device, out=noise_MND)
        h_EMF = torch.cat([support_ET, query_EP], dim=1)
        return self._classify_sets(adapt, h_EMF, label_T, noise, background, fit_on_queries=True)

    def _classify_alone(
        self, adapt: AdaptSettings, h_TF: Tensor, h_PF: Tensor, seed: int, label_T: Tensor, background: float | None
    ) -> Tensor:
        """Classify each query separately, in a set of the support and this query; several sets at a time: (P, K)."""
        T = len(h_TF)
        noise_MND = inductive_noise(self, adapt, T, seed, h_PF.device)
        values_per_set = (T + 1) * adapt.samples * self.latent
        sets_per_batch = max(1, MAX_LATENT_VALUES[h_PF.device.type] // (4 * values_per_set))
        log_p = []
        for query in h_PF[:, None].split(sets_per_batch):
            h_EMF = torch.cat([h_TF.expand(len(query), -1, -1), query], dim=1)
            noise_EMND = noise_MND.expand(len(query), -1, -1, -1)
            answer_EPK = self._classify_sets(adapt, h_EMF, label_T, noise_EMND, background, fit_on_queries=False)
            log_p.append(answer_EPK[:, 0])
        return torch.cat(log_p)

    def _classify_sets(
        self,
        adapt: AdaptSettings,
        h_EMF: Tensor,
        label_T: Tensor,
        noise_EMND: Tensor,
        background: float | None,
        *,
        fit_on_queries: bool,
    ) -> Tensor:
        """Classify the last P of the M = T + P points of each set; the others are the support: (E, P, K)."""
        z_EMND = sample_latents(*self.posterior(h_EMF), noise_EMND)
        support, queries = z_EMND.split([len(label_T), z_EMND.shape[1] - len(label_T)], dim=1)
        options: dict[str, Any] = {"fit_on_queries": fit_on_queries, "background": background}
        return self.classify_latents(adapt, support, label_T, queries, **options)

    def classify_latents(
        self,
        adapt: AdaptSettings,
        z_ETND: Tensor,
        label_T: Tensor,
        z_EPND: Tensor,
        *,
        fit_on_queries: bool,
        background: float | None,
    ) -> Tensor:
        """Fit the classes to latents and classify the queries, as `class_posterior.classify_latents`: (E, P, K).

        A method with another mixture overrides this; it classifies all modes, `adapt.inductive = "features"` too.
        """
        return classify_latents(adapt, z_ETND, label_T, z_EPND, fit_on_queries=fit_on_queries, background=background)

    def episodes_per_batch(self, adapt: AdaptSettings, points: int, device: torch.device) -> int:
        """Return how many episodes of this many points (support and queries) fit one batch; at least 1."""
        return max(1, MAX_LATENT_VALUES[device.type] // (8 * points * adapt.samples * self.latent))


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised samples mean + exp(log_variance / 2) * noise: (..., D), (..., D), (..., N, D) -> (..., N, D)."""
    return (torch.exp(0.5 * log_variance).unsqueeze(-2) * noise).add_(mean.unsqueeze(-2))


def latent_noise(
    model: MetaGMVAE, adapt: AdaptSettings, points: int, seed: int, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """Draw the standard normal noise of the latents of one episode, (points, N, D), into `out` if it is given."""
    generator = keyed_generator(device, "predict", int(seed))
    return torch.randn(points, adapt.samples, model.latent, generator=generator, device=device, out=out)


def inductive_noise(
    model: MetaGMVAE, adapt: AdaptSettings, support_images: int, seed: int, device: torch.device
) -> Tensor:
    """Draw the noise of the support and one query, (support_images + 1, N, D).

    All queries share one draw: with noise by position, the answer for a query would depend on its place among the
    others. All support images share another draw, so it does not depend on their order and on the names of the classes.
    """
    noise_MND = latent_noise(model, adapt, support_images + 1, seed, device)
    return torch.cat([noise_MND[:1].expand(support_images, -1, -1), noise_MND[-1:]])
