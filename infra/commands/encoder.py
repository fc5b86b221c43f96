"""`encoder` writes an encoder by name with published or local weights as a model; options for encoders alone."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.infra.commands.parsing import Answer, Parsers, add_command
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.training.trainer.package import LoadedModel

HEADS = ("nearest-mean", "logistic-regression", "soft-k-means", "optimal-transport", "laplacian", "em")
"""The keys of `evaluation.encoders.heads.HEADS`, which `--help` does not import."""
ENCODER_HELP = "timm:NAME or torchvision:NAME"


def add_encoder_options(parser: ArgumentParser, *, head: bool = True) -> None:
    """Add the options of encoders by name to a command, and `--head` for encoders alone."""
    help_text = "weights of an encoder by name, .safetensors or .pth (default: the published ones)"
    parser.add_argument("--weights", metavar="FILE", help=help_text)
    help_text = "side to which images are resized for an encoder by name; 0: none (default: its published input size)"
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help=help_text)
    if head:
        add_head(parser)


def add_head(parser: ArgumentParser, default: str = "nearest-mean") -> None:
    """Add `--head` to a command."""
    help_text = "classifier on the features of an encoder alone, with settings chosen on validation classes "
    help_text += f"(default: {default})"
    parser.add_argument("--head", choices=HEADS, help=help_text)


def encoder_options(arguments: Namespace, dataset: Dataset | None) -> dict[str, Any]:
    """Return the arguments of `resolve_model` from the options of `add_encoder_options`."""
    weights = Path(arguments.weights) if arguments.weights else None
    return {"weights": weights, "image_size": arguments.image_size, "dataset": dataset}


def add(parsers: Parsers) -> None:
    """Add the command of this module to the parser."""
    example = "metagmvae encoder timm:vit_small_patch14_dinov2.lvd142m --weights dino.safetensors --data data/mine "
    example += "--out models/dino"
    description = "write a published encoder as a model that evaluate, classify, compare and promote take"
    parser = add_command(parsers, "encoder", encoder, description, example)
    help_text = f"{ENCODER_HELP}, resnet12, conv4, conv5, or an encoder that another package adds"
    parser.add_argument("name", metavar="NAME", help=help_text)
    add_encoder_options(parser, head=False)
    parser.add_argument("--data", required=True, metavar="URI", help="dataset whose images the encoder takes")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")


def encoder(arguments: Namespace) -> Answer:
    """Run `metagmvae encoder`."""
    from metagmvae.evaluation.encoders.named_encoder import is_encoder_name, named_encoder
    from metagmvae.infra.runs.encoder_folder import write_encoder
    from metagmvae.pipelines.shards.dataset import Dataset

    if not is_encoder_name(arguments.name):
        raise DataError(f"{arguments.name}: not the name of an encoder; give {ENCODER_HELP}, resnet12, conv4 or conv5")
    out = Path(arguments.out)
    if out.exists():
        raise DataError(f"--out {out}: already exists; choose a new folder")
    dataset = Dataset.open(arguments.data)
    loaded: LoadedModel = named_encoder(arguments.name, **encoder_options(arguments, dataset))
    write_encoder(loaded, dataset, out)
    return {
        "model": str(out),
        "encoder": loaded.settings.model.encoder,
        "weights": loaded.info.get("weights"),
        "features": loaded.model.feature_dim,
        "image_shape": list(loaded.image_shape),
        "image_size": loaded.settings.model.image_size,
    }
