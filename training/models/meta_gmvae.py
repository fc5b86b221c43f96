"""Meta-GMVAE: the set-conditioned posterior q(z | x, D) and the decoder p(x | z) (Lee et al., ICLR 2021, section 3.2).

Notation: B sets, M data points per set, N Monte Carlo samples, n images, C x H x W image shape, F feature size,
D latent size; in q(z | x, D), D is the set.
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
    """Variational autoencoder whose posterior depends on the whole set (Tables 3, 4, 7 and 8).

    The prior is no part of it: `training.objectives.mixture` fits the mixture to each episode. Names of submodules are
    keys of stored checkpoints. The settings are described in `configs.schema.ModelSettings`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        encoder: str = "conv4",
        image_size: int = 0,
        final_relu: bool = True,
        averaging: Average = "none",
        normalise: Literal["none", "imagenet"] = "none",
        reconstruct: Literal["pixels", "features"] = "pixels",
        scaling: Literal["standard", "whitened", "raw"] = "standard",
        variance: Literal["calibrated", "unit", "half"] = "calibrated",
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
        net = build_encoder(encoder, image_shape, channels, image_size, final_relu, averaging, normalise)
        super().__init__(net, image_shape)
        self.latent = latent
        # Conv4 on 28x28 images has F = 256, the width of the set encoder in Table 3; other sizes need a projection.
        self.inlet = nn.Identity() if self.feature_dim == width else nn.Linear(self.feature_dim, width)
        self.attention = SetAttention(width, heads, layers, attention_scale, attention_block, attention_activation)
        self.head = nn.Linear(width, latent + (latent if posterior == "diagonal" else 1))
        self.reconstruct = reconstruct
        self.variance = variance
        scales = {"standard": FeatureScale, "whitened": FeatureWhitening}
        scaled = reconstruct == "features" and scaling in scales
        self.scale: nn.Module = scales[scaling](self.feature_dim) if scaled else nn.Identity()
        self.decoder: nn.Module = (
            FeatureDecoder(self.feature_dim, latent, final_relu=final_relu and scaling == "raw")
            if reconstruct == "features"
            else ConvDecoder(image_shape, channels, latent, width)
        )

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


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised samples mean + exp(log_variance / 2) * noise: (..., D), (..., D), (..., N, D) -> (..., N, D)."""
    return mean.unsqueeze(-2) + torch.exp(0.5 * log_variance).unsqueeze(-2) * noise
