"""An encoder by name (`timm:NAME`, `torchvision:NAME`, `resnet12`) with published or local weights, as a model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import ModelSettings, Settings
from metagmvae.evaluation.fewshot.encoder_package import load_dataset_encoder
from metagmvae.pipelines.extensions import extension_names
from metagmvae.pipelines.files import sha256_file
from metagmvae.pipelines.optional_packages import MissingPackageError
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.vectors import VECTORS
from metagmvae.training.models.encoder_weights import fit_weights, read_weights, unwrapped
from metagmvae.training.models.encoders import OWN_ENCODERS, EncoderError, EncoderModel
from metagmvae.training.models.library_encoders import (
    LIBRARIES,
    TORCHVISION,
    LibraryEncoder,
    LibraryNetwork,
    known_torchvision,
    library_network,
)
from metagmvae.training.models.multi_crop import MultiCropEncoder
from metagmvae.training.trainer.builders import build_encoder_model
from metagmvae.training.trainer.package import LoadedModel

SIZES = {"resnet12": 84}
"""Side of the images of encoders without metadata; the others take images as they are stored."""
MOST_PIXELS = 2**14


def is_encoder_name(ref: str | Path) -> bool:
    """Whether a reference names an encoder, and no file or folder of that name exists."""
    name = str(ref)
    if name.startswith(LIBRARIES):
        return True
    if Path(name).exists() or not name.replace("_", "").isalnum():
        return False
    return name in (*OWN_ENCODERS, *extension_names("metagmvae.encoders"), *known_torchvision())


def named_encoder(
    name: str, weights: Path | None = None, dataset: Dataset | None = None, image_size: int | None = None
) -> LoadedModel:
    """Build an encoder and load its weights; `info["weights"]` records where they come from.

    Input size and normalisation are those in the metadata of the library. The plain name of a network of torchvision
    means `torchvision:NAME`; `resnet12` gets ImageNet's normalisation.

    Args:
        name: of the encoder, as `is_encoder_name` accepts it; `vectors`: the vectors of the dataset as they are.
        weights: file of weights; None: the published ones, which the library downloads if its cache lacks them.
        dataset: whose images it takes; None: colour images of its input size.
        image_size: side that images are resized to, in pixels; 0: not resized; None: the input size of the encoder.

    Raises:
        EncoderError: there is no such encoder, it does not accept such images, or it has no published weights.
        WeightsError: the file cannot be read or does not fit.
        MissingPackageError: timm is not installed.
    """
    if not name.startswith(LIBRARIES) and name not in (*OWN_ENCODERS, *extension_names("metagmvae.encoders")):
        name = f"{TORCHVISION}{name}"
    if name == VECTORS:
        if dataset is None or dataset.content != VECTORS or weights is not None or image_size is not None:
            raise EncoderError(f"{name}: stands for the vectors of a dataset themselves; give one of vectors as --data")
        return load_dataset_encoder(dataset)
    if image_size is not None and not 0 <= image_size <= MOST_PIXELS:
        raise DataError(f"--image-size {image_size}: give pixels from 0 (not resized) to {MOST_PIXELS}")
    try:
        network = library_network(name) if name.startswith(LIBRARIES) else None
    except MissingPackageError:
        raise
    except ValueError as error:
        raise EncoderError(f"{name}: {error}") from error
    if network is None and weights is None:
        raise EncoderError(f"{name}: has no published weights; give --weights FILE, or train it: metagmvae pretrain")
    size = image_size if image_size is not None else network.size[0] if network else SIZES.get(name, 0)
    image_shape = dataset.image_shape if dataset is not None else (3, size or 84, size or 84)
    normalise: Literal["imagenet", "none"] = "imagenet" if name == "resnet12" else "none"
    settings = Settings(name=name, model=ModelSettings(encoder=name, image_size=size, normalise=normalise))
    model = build_encoder_model(settings.model, image_shape, seed=0)
    input_shape = (size, size) if size else image_shape[1:]
    info = {"weights": _load(model, weights, network, input_shape)}
    preprocessing = dataset.preprocessing if dataset is not None else Preprocessing.of_shape(image_shape, invert=False)
    model = model.to(memory_format=torch.channels_last).eval()
    return LoadedModel(model, settings, image_shape, info, preprocessing)


def _load(
    model: EncoderModel, file: Path | None, network: LibraryNetwork | None, input_shape: tuple[int, int]
) -> dict[str, Any]:
    """Load weights into the network inside an encoder; return the record of where they come from."""
    encoder = model.encoder.net if isinstance(model.encoder, MultiCropEncoder) else model.encoder
    net = encoder.net if isinstance(encoder, LibraryEncoder) else encoder
    assert isinstance(net, nn.Module)
    if file is not None:
        weights, source = read_weights(file), str(file)
        record: dict[str, Any] = {"file": file.name, "sha256": sha256_file(file)}
    else:
        assert network is not None
        weights, source, record = _published(network, input_shape), f"{network.name}, published", {"published": True}
    weights, left_out = unwrapped(weights, net.state_dict())
    if network is not None:
        # It fails for weights of another network; the next step says how they differ.
        with suppress(KeyError, RuntimeError, ValueError, AttributeError, IndexError, TypeError):
            weights = network.convert(weights, net)
    fitting, of_head = fit_weights(net, weights, _head(net, network, weights), source)
    net.load_state_dict(fitting)
    left_out += of_head
    return record | ({"left_out": left_out} if left_out else {})


def _published(network: LibraryNetwork, input_shape: tuple[int, int]) -> dict[str, Tensor]:
    try:
        return network.download(input_shape)
    except Exception as error:  # whatever the client of a library raises without a network
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        remedy = "download them elsewhere and give --weights FILE"
        raise EncoderError(f"{network.name}: weights cannot be loaded ({reason}); {remedy}") from error


def _head(net: nn.Module, network: LibraryNetwork | None, weights: dict[str, Tensor]) -> frozenset[str]:
    """Names of the weights of the classifier that the network lacks; built only if some weights are not its own."""
    if not weights.keys() - net.state_dict().keys():
        return frozenset()
    if network is None:
        return frozenset(("fc.weight", "fc.bias", "classifier.weight", "classifier.bias"))
    with torch.device("meta"):
        return frozenset(network.build_complete().state_dict()) - frozenset(net.state_dict())
