"""`features`: what an encoder says of every image, as a data set."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from metagmvae.infra.commands.data import add_workers, map_tasks_of, target
from metagmvae.infra.commands.parsing import Answer, Parsers, add_command, progress_bar

if TYPE_CHECKING:
    from metagmvae.training.trainer.package import LoadedModel


TORCHVISION = "torchvision:"


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae features runs/simclr --data data/mini-imagenet --out data/mini-imagenet-features"
    what = "encode a data set of images into feature shards"
    parser = add_command(parsers, "features", features, what, example)
    help_ = "run folder, checkpoint, package, models:/name@alias, or torchvision:NETWORK with its published weights"
    parser.add_argument("model", metavar="MODEL", help=help_)
    parser.add_argument("--data", required=True, metavar="URI", help="data set of images")
    parser.add_argument("--out", required=True, help="folder, or s3://bucket/prefix, to write")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of a feature (float16)")
    help_ = "views of an image that its features are the mean over (as the model's settings say)"
    parser.add_argument("--average", choices=("none", "mirror", "crops"), help=help_)
    parser.add_argument("--shot", type=int, help="which best model, where a run keeps one for each shot")
    add_workers(parser)


def features(arguments: Namespace) -> Answer:
    """Run `metagmvae features`."""
    import torch

    from metagmvae.evaluation.fewshot.encoding import feature_source, with_encoder_average
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.pipelines.shards.writer import write_dataset

    dataset = Dataset.open(arguments.data)
    published = arguments.model.startswith(TORCHVISION)
    loaded = (
        _published(arguments.model, dataset.image_shape)
        if published
        else resolve_model(arguments.model, shot=arguments.shot)
    )
    if arguments.average is not None:
        loaded = with_encoder_average(loaded, arguments.average)
    with (
        feature_source(loaded, dataset, arguments.dtype) as source,
        target(arguments.out) as (out, uri),
        map_tasks_of(arguments, gpus=int(torch.cuda.is_available())) as map_tasks,
        progress_bar("shards", arguments.json) as on_progress,
    ):
        manifest = write_dataset(source, out, map_tasks=map_tasks, on_progress=on_progress)
    return {
        "data": uri,
        "name": manifest["name"],
        "feature_size": manifest["feature_size"],
        "dtype": manifest["dtype"],
        "encoder": manifest["encoder"],
        "samples": {split: part["samples"] for split, part in manifest["splits"].items()},
    }


def _published(name: str, image_shape: tuple[int, int, int]) -> LoadedModel:
    """A network of torchvision with the weights that torchvision publishes, downloaded where they are not there yet.

    Raises:
        BackboneError: there is no such network, or its weights cannot be had.
    """
    from metagmvae.configs.schema import ModelSettings, Settings
    from metagmvae.training.models.encoders import published_encoder
    from metagmvae.training.trainer.package import LoadedModel

    network = name.removeprefix(TORCHVISION)
    settings = Settings(name=name, model=ModelSettings(encoder=network))
    return LoadedModel(published_encoder(network, image_shape).eval(), settings, image_shape, {"weights": "DEFAULT"})
