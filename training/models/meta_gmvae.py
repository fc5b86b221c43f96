"""The model: q(z | x, D) with a set encoder on Conv4 features, and p(x | z) (Lee et al. 2021, section 3.2).

Notation: B sets, M points, n images, F features, D latent size, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import Average
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import ConvDecoder, FeatureDecoder
from metagmvae.training.models.encoders import EncoderModel, build_encoder
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening
from metagmvae.training.models.set_attention import SetAttention


class MetaGMVAE(EncoderModel):
    """Set-conditioned VAE. It knows no prior: the mixture is fitted to each episode outside of it."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        encoder: str = "conv4",
        image_size: int = 0,
        rectified: bool = True,
        average: Average = "none",
        reconstruct: Literal["pixels", "features"] = "pixels",
        features: Literal["standard", "whitened", "raw"] = "standard",
        variance: Literal["calibrated", "unit"] = "calibrated",
        latent: int = 64,
        channels: int = 64,
        width: int = 256,
        heads: int = 4,
        layers: int = 2,
        attention_scale: Literal["head", "model"] = "head",
        attention_block: Literal["transformer", "set-attention"] = "transformer",
        attention_activation: Literal["elu", "relu"] = "elu",
        posterior: Literal["isotropic", "diagonal"] = "diagonal",
    ) -> None:
        super().__init__(build_encoder(encoder, image_shape, channels, image_size, rectified, average), image_shape)
        self.latent = latent
        # At 28x28 Conv4 gives the width of Table 3 itself; other sizes need one projection.
        self.inlet = nn.Identity() if self.features == width else nn.Linear(self.features, width)
        self.attention = SetAttention(width, heads, layers, attention_scale, attention_block, attention_activation)
        self.head = nn.Linear(width, latent + (latent if posterior == "diagonal" else 1))
        self.reconstruct = reconstruct
        self.variance = variance
        scales = {"standard": FeatureScale, "whitened": FeatureWhitening}
        scaled = reconstruct == "features" and features in scales
        self.scale: nn.Module = scales[features](self.features) if scaled else nn.Identity()
        self.decoder: nn.Module = (
            FeatureDecoder(self.features, latent, rectified=rectified and features == "raw")
            if reconstruct == "features"
            else ConvDecoder(image_shape, channels, latent, width)
        )

    def encode_images(self, x: Tensor) -> Tensor:
        """f of Eq. 5, each image by itself: (n, C, H, W) in [0, 1] -> (n, F).

        Where features are reconstructed they are the data of the model, brought to one scale.
        """
        return self.scale_features(self.encoder(x))

    def scale_features(self, h: Tensor) -> Tensor:
        """Features as the encoder gives them, (n, F), to those that the model works on."""
        return self.scale(h)

    def posterior(self, h_BMF: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5: features of whole sets -> mean and log variance of q(z_j | x_j, D), (B, M, D) each."""
        hidden = at_least_float32(self.head(self.attention(self.inlet(h_BMF))))
        mean_BMD, log_variance = hidden[..., : self.latent], hidden[..., self.latent :]
        return mean_BMD, log_variance.expand_as(mean_BMD)

    def decode(self, z: Tensor) -> Tensor:
        """p(x | z): (n, D) -> logits of the Bernoulli means, (n, C, H, W), or means of features, (n, F)."""
        return self.decoder(z)


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised samples: (..., D), (..., D), (..., N, D) -> (..., N, D)."""
    return mean.unsqueeze(-2) + torch.exp(0.5 * log_variance).unsqueeze(-2) * noise
