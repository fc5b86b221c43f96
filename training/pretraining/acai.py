"""ACAI, an autoencoder whose interpolations look real (Berthelot, Raffel, Roy and Goodfellow, ICLR 2019).

"Understanding and Improving Interpolation in Autoencoders via an Adversarial Regularizer", arXiv 1807.07543, Eq. 1, 2.

Notation: n images of this rank, x the images, h their features, D latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import Settings
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import ConvDecoder
from metagmvae.training.models.encoders import EncoderModel, build_projector
from metagmvae.training.pretraining.critic import ImageCritic
from metagmvae.training.pretraining.step import PretrainMetrics, PretrainStep

ADVERSARIAL_WEIGHT = 0.5
"""lambda of Eq. 2."""
REAL_FRACTION = 0.2
"""gamma of Eq. 1: how much of the image is mixed into its reconstruction for the critic."""


class AcaiModules(nn.Module):
    """Decoder and critic of ACAI, and the optional MLP `pretrain.projector` between features and latent."""

    def __init__(self, model: EncoderModel, settings: Settings) -> None:
        super().__init__()
        sizes, channels = settings.pretrain.projector, settings.model.channels
        latent = sizes[-1] if sizes else model.feature_dim
        self.projector = build_projector(model.feature_dim, sizes)
        self.decoder = ConvDecoder(model.input_shape, channels, latent, width=0, batch_norm=False)
        self.critic = ImageCritic(model.input_shape, channels)


class AcaiStep(PretrainStep):
    """Reconstruction, and interpolations from which a critic cannot tell the mixing coefficient.

    The critic d regresses alpha from the decoded mixture g(alpha h_1 + (1 - alpha) h_2), alpha uniform in [0, 0.5], and
    0 from gamma x + (1 - gamma) g(h) (Eq. 1). Encoder and decoder minimise the squared error of the reconstruction and
    lambda times the squared prediction of the critic on mixtures (Eq. 2). As in the published code, errors are means
    over pixels, the image that is mixed with the i-th is the i-th from the end, and all networks have one learning rate
    and are updated together. Differences: batch normalisation in the encoder; the score of the critic is a function of
    its last feature map, where the published code takes the mean.
    """

    auxiliary: AcaiModules

    @classmethod
    def build_auxiliary(cls, model: EncoderModel, settings: Settings, images: int) -> nn.Module:
        """Decoder and critic at the input size of the encoder."""
        return AcaiModules(model, settings)

    def prepare(self, images: object, step: int) -> tuple[Tensor, ...]:
        """Images at the input size of the encoder, (n, C, H, W), and alpha, (n,), in [0, 0.5]."""
        x = self._resized(self._images(images), self.input_shape[1:])
        generator = self._generator("acai", step)
        alpha = torch.rand(len(x), generator=generator, device=x.device) / 2
        return self._in_format(x), alpha

    def compute(self, x: Tensor, alpha: Tensor) -> tuple[Tensor, PretrainMetrics]:
        """The sum of the losses of autoencoder and critic, from the results of `prepare`."""
        modules = self.auxiliary
        with self._autocast(x.device):
            h = modules.projector(self.encoder(x))
            mixed_h = alpha[:, None] * h + (1 - alpha[:, None]) * h.flip(0)
            reconstruction, mixture = modules.decoder(torch.cat([h, mixed_h])).chunk(2)
            almost_real = REAL_FRACTION * x + (1 - REAL_FRACTION) * reconstruction
            predicted_alpha = modules.critic.frozen(mixture)
            score_mixture, score_real = modules.critic(torch.cat([mixture, almost_real]).detach()).chunk(2)
        error = (at_least_float32(reconstruction) - x).square().mean()
        adversarial = predicted_alpha.square().mean()
        critic = (score_mixture - alpha).square().mean() + score_real.square().mean()
        metrics = {"squared_error": error, "adversarial_loss": adversarial, "critic_loss": critic}
        loss = error + ADVERSARIAL_WEIGHT * adversarial + critic
        return loss, {name: value.detach() for name, value in metrics.items()}
