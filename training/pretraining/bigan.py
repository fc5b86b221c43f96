"""BiGAN, a generator and an encoder that invert each other (Donahue, Krähenbühl and Darrell, ICLR 2017).

"Adversarial Feature Learning", arXiv 1605.09782, Eq. 3 and Section 3.4.

Notation: n images of this rank, x the images, z latents of size D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import Settings
from metagmvae.training.device.seeding import uniform
from metagmvae.training.models.conv import ConvDecoder
from metagmvae.training.models.encoders import EncoderModel, build_projector
from metagmvae.training.pretraining.critic import ImageCritic
from metagmvae.training.pretraining.step import PretrainMetrics, PretrainStep


class BiganModules(nn.Module):
    """Generator and discriminator of BiGAN, and the optional MLP `pretrain.projector` between features and latent."""

    def __init__(self, model: EncoderModel, settings: Settings) -> None:
        super().__init__()
        sizes, channels = settings.pretrain.projector, settings.model.channels
        self.latent = sizes[-1] if sizes else model.feature_dim
        self.projector = build_projector(model.feature_dim, sizes)
        self.generator = ConvDecoder(model.input_shape, channels, self.latent, width=0, batch_norm=False)
        self.discriminator = ImageCritic(model.input_shape, channels, self.latent)


class BiganStep(PretrainStep):
    """A discriminator of pairs (x, E(x)) and (G(z), z), z uniform in [-1, 1], which encoder and generator deceive.

    The discriminator minimises -log D(x, E(x)) - log(1 - D(G(z), z)); encoder and generator minimise the same with the
    labels exchanged, -log(1 - D(x, E(x))) - log D(G(z), z), which has stronger gradients than the negative of the first
    ("inverse objective"). All networks are updated together, as in the published code. Difference: only the encoder has
    batch normalisation. In the discriminator, real and generated pairs that are normalised separately can hardly be
    told apart in a short training, and pairs normalised together too easily.
    """

    auxiliary: BiganModules

    @classmethod
    def build_auxiliary(cls, model: EncoderModel, settings: Settings, images: int) -> nn.Module:
        """Generator and discriminator at the input size of the encoder."""
        return BiganModules(model, settings)

    def prepare(self, images: object, step: int) -> tuple[Tensor, ...]:
        """Images at the input size of the encoder, (n, C, H, W), and latents, (n, D)."""
        x = self._resized(self._images(images), self.input_shape[1:])
        z = uniform((len(x), self.auxiliary.latent), x, self._generator("bigan", step))
        return self._in_format(x), z

    def compute(self, x: Tensor, z: Tensor) -> tuple[Tensor, PretrainMetrics]:
        """The sum of the losses of the two sides, from the results of `prepare`."""
        modules = self.auxiliary
        with self._autocast(x.device):
            encoded = modules.projector(self.encoder(x))
            generated = torch.sigmoid(modules.generator(z))
            # One pass for both kinds of pairs.
            pairs = torch.cat([x, generated]), torch.cat([encoded, z])
            real, fake = modules.discriminator(*(part.detach() for part in pairs)).chunk(2)
            real_seen, fake_seen = modules.discriminator.frozen(*pairs).chunk(2)
        # -log sigmoid(s) = softplus(-s) and -log(1 - sigmoid(s)) = softplus(s).
        discriminator = F.softplus(-real).mean() + F.softplus(fake).mean()
        generator = F.softplus(real_seen).mean() + F.softplus(-fake_seen).mean()
        metrics = {"discriminator_loss": discriminator.detach(), "generator_loss": generator.detach()}
        return discriminator + generator, metrics
