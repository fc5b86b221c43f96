"""Encoders from the libraries torchvision and timm: `torchvision:NAME`, `timm:NAME[.TAG]`.

Input size and normalisation come from the metadata that the library has about its published weights.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metagmvae.configs.suggestions import similar
from metagmvae.pipelines.optional_packages import optional_package
from metagmvae.training.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, ColourNormalisation

TORCHVISION, TIMM = "torchvision:", "timm:"
LIBRARIES = (TORCHVISION, TIMM)
"""Prefixes of the names."""
HEADS = ("fc", "classifier", "head", "heads")
"""Attributes of torchvision's networks that hold their last layers."""
PORTED = ("googlenet", "inception_v3")
"""Networks of torchvision with weights from TensorFlow: inputs in [-1, 1]; and with auxiliary classifiers."""


@dataclass(frozen=True)
class LibraryNetwork:
    """A network of a library: how to build it, and what its published weights expect."""

    name: str
    """With the prefix of the library."""
    size: tuple[int, int]
    """Height and width of the images."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    build: Callable[[tuple[int, int]], nn.Module]
    """For images of a height and width: the network without its classifier."""
    build_complete: Callable[[], nn.Module]
    """The network with its classifier."""
    download: Callable[[tuple[int, int]], dict[str, Tensor]]
    """The published weights for images of a height and width, from the cache of the library or its server."""
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda weights, network: weights
    """Published weights as this network takes them, for example with positions for another size of images."""


def library_network(name: str) -> LibraryNetwork:
    """Find a network by its name with the prefix of the library.

    Raises:
        ValueError: the library has no such network.
        MissingPackageError: timm is not installed.
    """
    prefix = next(prefix for prefix in LIBRARIES if name.startswith(prefix))
    return (_torchvision if prefix == TORCHVISION else _timm)(name.removeprefix(prefix))


class LibraryEncoder(nn.Module):
    """A network of a library without its classifier: images (n, C, H, W) in [0, 1] -> (n, F).

    Grey images are repeated to the channels of the network.
    """

    def __init__(self, name: str, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        network = library_network(name)
        self.net = network.build(image_shape[1:])
        self.normalise = ColourNormalisation(network.mean, network.std)
        if image_shape[0] not in (1, len(network.mean)):
            raise ValueError(f"takes images of {len(network.mean)} channels, not {image_shape[0]}")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalise(x.expand(-1, len(self.normalise.mean), -1, -1)))


def known_torchvision() -> list[str]:
    """Names of torchvision's classification networks."""
    import torchvision
    from torchvision.models import list_models

    return list_models(module=torchvision.models)


def near_names(name: str, known: Sequence[str]) -> str:
    """End of an error message: at most three of the many known names, and where the others stand."""
    near = similar(name, known) or difflib.get_close_matches(name, known, n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else ";"
    return f"{meant} encoders by name: training/README.md"


def remove_head(net: nn.Module) -> int:
    """Replace the last linear layer of a network of torchvision by the identity; return its input size, F."""
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
    raise ValueError("has no last linear layer that could be removed; use another network")


def _torchvision(name: str) -> LibraryNetwork:
    from torchvision.models import get_model, get_model_weights

    known = known_torchvision()
    if name not in known:
        raise ValueError(f"torchvision has no such classification network{near_names(name, known)}")
    weights = get_model_weights(name).DEFAULT
    expected = weights.transforms()
    options: dict[str, Any] = {"init_weights": False} if name in PORTED else {}

    def build(_: tuple[int, int]) -> nn.Module:
        net = get_model(name, weights=None, **options, **({"aux_logits": False} if name in PORTED else {}))
        remove_head(net)
        return net

    centre = (0.5, 0.5, 0.5)
    return LibraryNetwork(
        f"{TORCHVISION}{name}",
        (expected.crop_size[0], expected.crop_size[0]),
        centre if name in PORTED else tuple(expected.mean),
        centre if name in PORTED else tuple(expected.std),
        build,
        lambda: get_model(name, weights=None, **options),
        lambda _: dict(weights.get_state_dict(check_hash=True, weights_only=True, progress=False)),
    )


def _timm(name: str) -> LibraryNetwork:
    with optional_package("timm", f"{TIMM}{name}", "choose a network of torchvision"):
        import timm
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = similar(architecture, timm.list_models())[:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm {timm.__version__} has no such network; {hint}")
    published = timm.models.get_pretrained_cfg(architecture)
    tags = [each.partition(".")[2] for each in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag:
        if tag not in tags:
            raise ValueError(f"timm has no weights {tag!r} of {architecture}; it has: {', '.join(tags) or 'none'}")
        published = timm.models.get_pretrained_cfg(name)
    if published is None:  # the author of the network published nothing about its weights
        mean, std, size, fixed = IMAGENET_MEAN, IMAGENET_STD, (224, 224), False
    else:
        mean, std = tuple(published.mean), tuple(published.std)
        size, fixed = tuple(published.input_size[1:]), published.fixed_input_size

    def create(input_size: tuple[int, int], **options: Any) -> nn.Module:
        resized = {"img_size": input_size} if fixed and input_size != size else {}
        try:
            return timm.create_model(name, **resized, **options)
        except (TypeError, AssertionError, RuntimeError, ValueError) as error:
            if not resized or options.get("pretrained"):
                raise
            # Which networks can be built for other sizes stands in no metadata.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot take images of {input_size} ({reason}); set the image size to {size}") from error

    def download(input_size: tuple[int, int]) -> dict[str, Tensor]:
        hub = logging.getLogger("huggingface_hub")
        level = hub.level
        hub.setLevel(logging.CRITICAL)  # it logs each attempt; the error at the end says it all
        try:
            return create(input_size, num_classes=0, pretrained=True).state_dict()
        finally:
            hub.setLevel(level)

    return LibraryNetwork(
        f"{TIMM}{name}",
        size,
        mean,
        std,
        lambda input_size: create(input_size, num_classes=0),
        lambda: create(size),
        download,
        _timm_weights,
    )


def _timm_weights(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Convert published weights by the function of timm that does so when it downloads them."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    with torch.no_grad():
        return dict(weights if convert is None else convert(weights, network))
