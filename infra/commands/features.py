"""`features` encodes a dataset of images; `ceiling` finds classes that its features do not separate."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from metagmvae.evaluation.provenance import dataset_origin, provenance
from metagmvae.infra.commands.data import CONTINUED, add_worker_options, task_mapper
from metagmvae.infra.commands.encoder import ENCODER_HELP, add_encoder_options, encoder_options
from metagmvae.infra.commands.models import MODEL_HELP
from metagmvae.infra.commands.parsing import Answer, Parsers, add_command, add_tracking, output_file, progress_bar

if TYPE_CHECKING:
    from metagmvae.pipelines.records import MapTasks
    from metagmvae.pipelines.shards.feature_source import FeatureSource


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae features runs/simclr --data data/mini-imagenet --out data/mini-imagenet-features"
    description = "encode a dataset of images with a trained encoder and write a dataset of features"
    parser = add_command(parsers, "features", features, description, example, CONTINUED)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or {ENCODER_HELP} with published weights")
    add_encoder_options(parser, head=False)
    parser.add_argument("--data", required=True, metavar="URI", help="dataset of images")
    parser.add_argument("--out", required=True, metavar="URI", help="folder or s3://bucket/prefix to write to")
    help_text = "number format of the features (default: float16)"
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help=help_text)
    help_text = "views whose features are averaged: none (the image alone), mirror (and its mirror image), crops "
    help_text += "(twelve views), affine (five views of strokes); default: as in the settings of the model"
    parser.add_argument("--average", choices=("none", "mirror", "crops", "affine"), help=help_text)
    help_text = "shot whose best model is used, if the run keeps a best model per shot"
    parser.add_argument("--shot", type=int, metavar="S", help=help_text)
    add_tracking(parser)
    add_worker_options(parser)
    _add_ceiling(parsers)


def _add_ceiling(parsers: Parsers) -> None:
    example = "metagmvae ceiling runs/omniglot --data data/omniglot --ways 5 20 --shots 1 5 --record ceiling.json"
    description = "find classes whose images cannot be told apart, such as symmetric characters and their rotations, "
    description += "and the highest accuracy that they leave possible"
    parser = add_command(parsers, "ceiling", ceiling, description, example)
    help_text = f"{MODEL_HELP}, or {ENCODER_HELP}: its features tell the classes apart"
    parser.add_argument("model", metavar="MODEL", help=help_text)
    add_encoder_options(parser, head=False)
    parser.add_argument("--data", required=True, metavar="URI", help="dataset")
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    help_text = "classes per episode, one result row each (default: 5)"
    parser.add_argument("--ways", type=int, nargs="+", default=[5], metavar="K", help=help_text)
    help_text = "labelled images per class, which decide what episodes are drawn (default: 1)"
    parser.add_argument("--shots", type=int, nargs="+", default=[1], metavar="S", help=help_text)
    parser.add_argument("--query", type=int, default=15, metavar="Q", help="images to classify per class (default: 15)")
    parser.add_argument("--episodes", type=int, default=1000, metavar="N", help="number of episodes (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    help_text = "write the result with criterion, fingerprints and versions"
    parser.add_argument("--record", metavar="FILE.json", type=output_file, help=help_text)


def features(arguments: Namespace) -> Answer:
    """Run `metagmvae features`."""
    from metagmvae.evaluation.fewshot.encoder_package import encoder_only, feature_source, with_average
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.workflows.prepare import describe_output
    from metagmvae.pipelines.shards.dataset import Dataset

    dataset = Dataset.open(arguments.data)
    loaded = resolve_model(arguments.model, shot=arguments.shot, **encoder_options(arguments, dataset))
    if arguments.average is not None:
        loaded = with_average(encoder_only(loaded), arguments.average)
    with feature_source(loaded, dataset, arguments.dtype) as source, task_mapper(arguments, gpu=True) as map_tasks:
        if arguments.dry_run:
            return describe_output(source, arguments.out)
        return _write(source, arguments, map_tasks)


def _write(source: FeatureSource, arguments: Namespace, map_tasks: MapTasks | None) -> Answer:
    from metagmvae.infra.workflows.prepare import open_output
    from metagmvae.pipelines.shards.writer import write_dataset

    with open_output(arguments.out) as (out, uri), progress_bar("shards", arguments.json) as on_progress:
        manifest = write_dataset(source, out, map_tasks=map_tasks, on_progress=on_progress)
    described = {key: manifest[key] for key in ("name", "feature_size", "dtype", "encoder")}
    samples = {split: part["samples"] for split, part in manifest["splits"].items()}
    return {"data": uri, **described, "samples": samples}


def ceiling(arguments: Namespace) -> Answer:
    """Run `metagmvae ceiling`."""
    from metagmvae.evaluation.uncertainty.split_ceiling import split_ceiling
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.pipelines.files import write_json
    from metagmvae.pipelines.shards.dataset import Dataset

    dataset = Dataset.open(arguments.data)
    loaded = resolve_model(arguments.model, **encoder_options(arguments, dataset))
    common: dict[str, Any] = {key: getattr(arguments, key) for key in ("query", "episodes", "seed")}
    tasks = [{"way": way, "shot": shot, **common} for way in arguments.ways for shot in arguments.shots]
    found = split_ceiling(loaded.model, dataset, tasks, arguments.split)
    about = {"split": arguments.split, "data": str(arguments.data), "model": str(arguments.model)}
    if arguments.record:
        origin = {"dataset": dataset_origin(dataset.manifest, dataset.fingerprint), "trained": loaded.info}
        made_with = {"data_fingerprint": dataset.fingerprint, "environment": provenance()}
        write_json(arguments.record, found | about | origin | made_with)
    lines = [{"alike classes": ", ".join(names)} for names in found["groups"]]
    return found | about | ({} if arguments.json else {"groups": lines})
