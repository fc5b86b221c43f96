"""Encoders by name: Conv4, Conv5, and what torchvision has; an encoder alone, as SimCLR trains it.

Every encoder maps images (n, C, H, W) in [0, 1] to features (n, F), and says F as `features`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import Average
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import ConvBlock, ConvEncoder
from metagmvae.training.models.multi_crop import MultiCropEncoder

OWN_ENCODERS = ("conv4", "conv5")
HEADS = ("fc", "classifier", "head", "heads")
"""What torchvision's networks call their last layers."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of colours, as torchvision's weights expect them."""


class BackboneError(ValueError):
    """The name is of no network that can be an encoder here."""


def build_encoder(
    name: str,
    image_shape: tuple[int, int, int],
    channels: int,
    image_size: int = 0,
    rectified: bool = True,
    average: Average = "none",
) -> nn.Module:
    """A freshly initialised encoder.

    Args:
        name: `conv4` (Table 3), `conv5` (Table 6), or a classification network of torchvision.
        image_shape: (C, H, W) of the images.
        channels: of each block of `conv4` and `conv5`.
        image_size: side that images are resized to first; 0: none.
        rectified: `conv4` and `conv5` end in a ReLU.
        average: over which views of an image features are the mean, once trained (`training.models.multi_crop`).

    Raises:
        BackboneError: there is no such network, or it does not take such images.
    """
    seen = (image_shape[0], image_size, image_size) if image_size else image_shape
    try:
        if name == "conv4":
            net: nn.Module = ConvEncoder(seen, channels, rectified=rectified)
        elif name == "conv5":
            net = ConvEncoder(seen, channels, levels=5, round_up=False, rectified=rectified)
        else:
            net = TorchvisionEncoder(name, seen)
    except ValueError as error:
        raise BackboneError(f"model.encoder ({name}): {error}") from error
    return MultiCropEncoder(net, seen[1:], average) if image_size or average != "none" else net


class TorchvisionEncoder(nn.Module):
    """A classification network of torchvision without its last layer; grey images become three equal channels."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        import torchvision
        from torchvision.models import get_model, list_models

        known = list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(f"no such encoder; known: {', '.join([*OWN_ENCODERS, *known])}")
        self.net = get_model(name, weights=None)
        self.features = _without_head(self.net)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self._try(image_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.expand(-1, 3, -1, -1) - self.mean) / self.deviation)

    @torch.no_grad()
    def _try(self, image_shape: tuple[int, int, int]) -> None:
        """Encode one empty image: some networks take no small images, or have outputs beside the features."""
        try:
            h = self.eval()(torch.zeros(1, *image_shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"does not take images of {image_shape} ({reason}); set model.image_size") from error
        if not isinstance(h, Tensor) or h.shape != (1, self.features):
            raise ValueError("does not end in one vector of features; use another network")
        self.train()


def _without_head(net: nn.Module) -> int:
    """Take the last linear layer off; return the size of what went into it."""
    for name in HEADS:
        head = getattr(net, name, None)
        if isinstance(head, nn.Linear):
            setattr(net, name, nn.Identity())
            return head.in_features
        if isinstance(head, nn.Sequential):
            linear = [key for key, layer in head.named_children() if isinstance(layer, nn.Linear)]
            if linear:
                last = getattr(head, linear[-1])
                setattr(head, linear[-1], nn.Identity())
                return last.in_features
    raise ValueError("has no last linear layer that could be taken off; use another network")


class EncoderModel(nn.Module):
    """Images to features by one encoder: what SimCLR trains, and what every model of ours begins with."""

    def __init__(self, encoder: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.features: int = encoder.features  # type: ignore[assignment]
        self.image_shape = image_shape

    @staticmethod
    def scale_images(images: Tensor) -> Tensor:
        """uint8 (..., C, H, W) -> float32 in [0, 1]."""
        return images.float() / 255

    def encode_images(self, x: Tensor) -> Tensor:
        """(n, C, H, W) in [0, 1] -> (n, F)."""
        return self.scale_features(self.encoder(x))

    def scale_features(self, h: Tensor) -> Tensor:
        """Features as the encoder gives them, (n, F), as they are."""
        return at_least_float32(h)


def published_encoder(name: str, image_shape: tuple[int, int, int]) -> EncoderModel:
    """A network of torchvision with the weights that torchvision publishes for it (supervised, ImageNet).

    Raises:
        BackboneError: there is no such network, it does not take such images, or its weights cannot be had.
    """
    from torchvision.models import get_model_weights

    if name in OWN_ENCODERS:
        raise BackboneError(f"{name}: torchvision publishes no weights of it; train it with `metagmvae pretrain`")
    encoder = build_encoder(name, image_shape, channels=0)
    assert isinstance(encoder, TorchvisionEncoder)
    try:
        weights = get_model_weights(name).DEFAULT.get_state_dict(check_hash=True, weights_only=True, progress=False)
    except (OSError, RuntimeError) as error:
        raise BackboneError(f"{name}: its weights cannot be had ({error}); see TORCH_HOME and the network") from error
    own = encoder.net.state_dict()
    encoder.net.load_state_dict({key: value for key, value in weights.items() if key in own})
    return EncoderModel(encoder, image_shape)


def build_projector(features: int, sizes: tuple[int, ...]) -> nn.Sequential:
    """SimCLR's head g: linear layers with ReLU between them, no normalisation; the identity for no sizes."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(features, size), nn.ReLU()]
        features = size
    return nn.Sequential(*layers[:-1])


def encoder_digest(encoder: nn.Module) -> str:
    """sha256 of the weights and statistics of an encoder, by name, type and shape: equal where its features are."""
    digest = hashlib.sha256()
    # Weights do not say whether a ReLU follows them; digests of encoders that have it stay what they were.
    if any(isinstance(module, ConvBlock) and not module.rectified for module in encoder.modules()):
        digest.update(b"not rectified;")
    if isinstance(encoder, MultiCropEncoder) and encoder.average != "none":
        digest.update(f"average {encoder.average};".encode())
    for name, value in sorted(encoder.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()
