"""Encoders by name (own ones, those of torchvision, timm and other packages) and the encoder-only model of SimCLR.

Every encoder maps images (n, C, H, W) in [0, 1] to features (n, F), and has F as its attribute `feature_dim`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import Average, ModelSettings
from metagmvae.pipelines.extensions import Group, check_options, extension_names, load_extension
from metagmvae.pipelines.optional_packages import MissingPackageError
from metagmvae.pipelines.vectors import VECTORS, vector_digest
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.conv import ConvBlock, ConvEncoder
from metagmvae.training.models.library_encoders import (
    LIBRARIES,
    LibraryEncoder,
    known_torchvision,
    near_names,
    remove_head,
)
from metagmvae.training.models.multi_crop import INNER, MultiCropEncoder
from metagmvae.training.models.normalisation import ImageNetNormalisation
from metagmvae.training.models.resnet12 import ResNet12

ENCODERS: Group = "metagmvae.encoders"
OWN_ENCODERS = ("conv4", "conv5", "resnet12", VECTORS)


class EncoderError(ValueError):
    """The name is not a network that can serve as an encoder."""


def build_encoder(
    name: str,
    image_shape: tuple[int, int, int],
    channels: int,
    image_size: int = 0,
    final_relu: bool = True,
    averaging: Average = "none",
    normalise: Literal["none", "imagenet"] = "none",
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A freshly initialised encoder.

    Args:
        name: `conv4` (Table 3), `conv5` (Table 6), `resnet12`, `vectors`, `torchvision:NAME`, `timm:NAME`, an encoder
            that another package adds (`metagmvae.encoders`), or the plain name of a network of torchvision.
        image_shape: (C, H, W) of the images.
        channels: of each block of `conv4` and `conv5`.
        image_size: side length that images are resized to first; 0: not resized.
        final_relu: whether `conv4` and `conv5` end in a ReLU.
        averaging: multi-crop averaging in evaluation mode, see `MultiCropEncoder`.
        normalise: input normalisation of `conv4`, `conv5` and `resnet12`; the others have that of their weights.
        options: of an encoder that another package adds.

    Raises:
        EncoderError: there is no such network or option, or it does not accept images of this shape.
        MissingPackageError: timm is not installed.
    """
    input_shape = (image_shape[0], image_size, image_size) if image_size else image_shape
    conv: dict[str, Any] = {"final_relu": final_relu, "normalise": normalise == "imagenet"}
    try:
        added = None if name in OWN_ENCODERS or name.startswith(LIBRARIES) else load_extension(ENCODERS, name)
        if name == "conv4":
            net: nn.Module = ConvEncoder(input_shape, channels, **conv)
        elif name == "conv5":
            net = ConvEncoder(input_shape, channels, levels=5, round_up=False, **conv)
        elif name == "resnet12":
            net = ResNet12(input_shape, normalise == "imagenet")
        elif name == VECTORS:
            if image_size or averaging != "none":
                raise ValueError("vectors have no size and no views; leave out model.image_size and model.average")
            net = VectorEncoder(input_shape)
        elif name.startswith(LIBRARIES):
            net = LibraryEncoder(name, input_shape)
            net.feature_dim = _feature_dim(net, input_shape)  # type: ignore[assignment]
        elif added is not None:
            check_options("model.options", options or {}, name, added)
            net = AddedEncoder(added, input_shape, options or {})
        else:
            net = TorchvisionEncoder(name, input_shape)
        if added is None:
            check_options("model.options", options or {}, name, None)
    except MissingPackageError:
        raise
    except ValueError as error:
        raise EncoderError(f"model.encoder ({name}): {error}") from error
    return MultiCropEncoder(net, input_shape[1:], averaging) if image_size or averaging != "none" else net


def configured_encoder(settings: ModelSettings, image_shape: tuple[int, int, int]) -> nn.Module:
    """A freshly initialised encoder of the settings. Errors are those of `build_encoder`."""
    return build_encoder(
        settings.encoder,
        image_shape,
        settings.channels,
        settings.image_size,
        settings.rectified,
        settings.average,
        settings.normalise,
        settings.options,
    )


class VectorEncoder(nn.Module):
    """The encoder of a dataset of vectors (`pipelines.vectors`): returns them as they are, (n, F, 1, 1) -> (n, F)."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        if image_shape[1:] != (1, 1):
            raise ValueError(f"takes vectors, not images of {image_shape}; choose an encoder of images")
        self.feature_dim = image_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class TorchvisionEncoder(nn.Module):
    """A classification network of torchvision by its plain name: images as they are, normalised by ImageNet's colours.

    `torchvision:NAME` is the same network with the normalisation of its published weights (`library_encoders`).
    """

    def __init__(self, name: str, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        from torchvision.models import get_model

        known = known_torchvision()
        if name not in known:
            names = [*OWN_ENCODERS, *extension_names(ENCODERS), *known]
            raise ValueError(f"no such encoder{near_names(name, names)}")
        self.net = get_model(name, weights=None)
        self.feature_dim = remove_head(self.net)
        self.normalise = ImageNetNormalisation()
        if _feature_dim(self, image_shape) != self.feature_dim:
            raise ValueError("does not return one feature vector per image; use another network")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalise(x.expand(-1, 3, -1, -1)))


class AddedEncoder(nn.Module):
    """An encoder that another package adds: a function of the image shape (C, H, W) and options that returns a network.

    The network maps images (n, C, H, W) in [0, 1] to features (n, F).
    """

    def __init__(
        self, build: Callable[..., nn.Module], image_shape: tuple[int, int, int], options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        try:
            net = build(image_shape, **options)
        except Exception as error:  # whatever the code of another package raises
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"its package cannot build it ({type(error).__name__}: {reason})") from error
        if not isinstance(net, nn.Module):
            raise ValueError(f"its package returns {type(net).__name__} instead of a torch.nn.Module; update it")
        self.net = net
        self.feature_dim = _feature_dim(self, image_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@torch.no_grad()
def _feature_dim(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Number of features F of a black image: some networks reject small images, or return more than one tensor.

    Raises:
        ValueError: the network does not accept images of this shape, or does not return (n, F).
    """
    try:
        h = net.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"does not accept images of {image_shape} ({reason}); set model.image_size") from error
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 1:
        raise ValueError("does not return one feature vector per image; use another network")
    net.train()
    return h.shape[1]


class EncoderModel(nn.Module):
    """An encoder and its image shape (C, H, W): the encoder-only model of SimCLR, and the base class of `MetaGMVAE`."""

    def __init__(self, encoder: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_dim: int = encoder.feature_dim  # type: ignore[assignment]
        self.image_shape = image_shape

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the encoder sees, resized to `model.image_size` if that is set."""
        size = self.encoder.size if isinstance(self.encoder, MultiCropEncoder) else self.image_shape[1:]
        return (self.image_shape[0], *size)

    @property
    def takes_vectors(self) -> bool:
        """Whether its images are vectors, float (n, F, 1, 1), instead of pixels."""
        return isinstance(self.encoder, VectorEncoder)

    @property
    def compiled_networks(self) -> list[nn.Module]:
        """Networks that `train.compile` compiles."""
        return [self.encoder]

    @staticmethod
    def scale_images(images: Tensor) -> Tensor:
        """uint8 (..., C, H, W) -> float32 in [0, 1]; vectors, which are floats, stay as they are."""
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()

    def encode_images(self, x: Tensor) -> Tensor:
        """Scaled features of images: (n, C, H, W) in [0, 1] -> (n, F)."""
        return self.scale_features(self.encoder(x))

    def scale_features(self, h: Tensor) -> Tensor:
        """Raw features of the encoder, (n, F) -> the features that the model works on, (n, F); here the same."""
        return at_least_float32(h)


def build_projector(feature_dim: int, sizes: tuple[int, ...]) -> nn.Sequential:
    """SimCLR's projection head g, (n, F) -> (n, sizes[-1]): linear layers with ReLU between them, no normalisation.

    No sizes: the identity.
    """
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(feature_dim, size), nn.ReLU()]
        feature_dim = size
    return nn.Sequential(*layers[:-1])


def encoder_digest(encoder: nn.Module) -> str:
    """sha256 of the weights and running statistics of an encoder: equal digests mean equal features."""
    if isinstance(encoder, VectorEncoder):
        return vector_digest(encoder.feature_dim)
    digest = hashlib.sha256()
    # The weights do not show a missing ReLU, the input normalisation or multi-crop averaging, so the digest includes
    # them. (The defaults add nothing, which keeps older digests valid.)
    if any(isinstance(module, ConvBlock) and not module.relu for module in encoder.modules()):
        digest.update(b"not rectified;")
    if any(isinstance(module, ConvEncoder) and module.normalise is not None for module in encoder.modules()):
        digest.update(b"normalised by ImageNet;")
    if isinstance(encoder, MultiCropEncoder) and encoder.averaging != "none":
        digest.update(f"average {encoder.averaging};".encode())
    if isinstance(encoder, MultiCropEncoder) and isinstance(encoder.net, LibraryEncoder):
        digest.update(f"size {encoder.size};".encode())  # older digests, of other encoders, are without it
    wrapper = INNER if isinstance(encoder, MultiCropEncoder) else ""  # as older versions named the weights
    for name, value in sorted(encoder.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{wrapper}{name} {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()
