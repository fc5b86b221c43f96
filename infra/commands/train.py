"""`train`, `pretrain`, `track` and `demo`."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from metagmvae.infra.commands.parsing import DRY_RUN_HELP, Answer, Parsers, add_command, add_tracking

if TYPE_CHECKING:
    from metagmvae.training.trainer.stages import ModelKind


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae train omniglot-cpu --set data.uri=data/omniglot --set run.out=runs/first"
    description = "train a Meta-GMVAE or another method (method.name), after pre-training if the settings ask for it"
    _add_run(parsers, "train", train, description, example)
    example = "metagmvae pretrain mini-imagenet-cpu --set data.uri=data/mini-imagenet --set run.out=runs/simclr"
    _add_run(parsers, "pretrain", pretrain, "train only an encoder, without labels (pretrain.objective)", example)

    example = "metagmvae track runs/first"
    description = "upload a run or a sweep to MLflow; what was uploaded before is not sent again"
    interrupted = "the same command continues: what was uploaded is not sent again"
    parser = add_command(parsers, "track", track, description, example, interrupted)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run or of a sweep")
    add_tracking(parser)

    description = "run the whole workflow on generated glyphs: dataset, training, evaluation, registry, classification"
    interrupted = "delete the folder, or choose another --out, to start again"
    parser = add_command(parsers, "demo", demo, description, "metagmvae demo --out my-demo", interrupted)
    help_text = "new folder for all files of the demo (default: metagmvae-demo)"
    parser.add_argument("--out", default="metagmvae-demo", metavar="DIR", help=help_text)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="number of Ray workers (default: 2)")


def _add_run(parsers: Parsers, name: str, run: Callable[[Namespace], Answer], description: str, example: str) -> None:
    parser = add_command(parsers, name, run, description, example)
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="TOML file of settings, name of a preset, such as omniglot-cpu, or folder of a run: its settings",
    )
    help_text = "change a setting, for example train.steps=500; may be given several times"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help_text)
    help_text = "continue from the checkpoint in the run folder (setting run.out, or CONFIG)"
    parser.add_argument("--resume", action="store_true", help=help_text)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)


def train(arguments: Namespace) -> Answer:
    """Run `metagmvae train`."""
    return _run(arguments, "learner")


def pretrain(arguments: Namespace) -> Answer:
    """Run `metagmvae pretrain`."""
    return _run(arguments, "encoder")


def _run(arguments: Namespace, kind: ModelKind) -> Answer:
    from metagmvae.infra.runs.run_folder import METRICS, read_lines
    from metagmvae.infra.workflows.run_training import describe_training, load_run_settings, run_training

    settings = load_run_settings(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return describe_training(settings, kind=kind, resume=arguments.resume)
    quiet = arguments.quiet or arguments.json
    run_dir = run_training(settings, kind=kind, resume=arguments.resume, quiet=quiet)
    last = read_lines(run_dir / METRICS)[-1]
    answer: Answer = {"run": str(run_dir), "last": last}
    if settings.tracking.enabled and settings.tracking.register_as:
        from metagmvae.infra.registry.register import register
        from metagmvae.infra.tracking.mlflow_environment import TrackingError

        name = settings.tracking.register_as + ("-encoder" if kind == "encoder" else "")
        try:
            version = register(run_dir, settings.tracking, name, once=True)
        except TrackingError as error:
            later = f"metagmvae {arguments.command} {shlex.quote(str(run_dir))} --resume"
            raise TrackingError(f"{error}; the run is complete, but its model is not registered: {later}") from error
        answer["registered"] = version.uri
        if version.alias:
            answer["alias"] = f"models:/{version.name}@{version.alias}"
        elif settings.tracking.alias:
            data, alias = shlex.quote(settings.data.uri), settings.tracking.alias
            answer["alias"] = f"models:/{version.name}@{alias} stays where it is"
            answer["next"] = f"metagmvae promote {version.uri} --alias {alias} --data {data}"
    return answer


def track(arguments: Namespace) -> Answer:
    """Run `metagmvae track`."""
    from metagmvae.evaluation.sweeps.record import is_sweep
    from metagmvae.infra.tracking.run_tracker import track as track_run
    from metagmvae.infra.tune.sweep_uploader import track_sweep

    upload = track_sweep if is_sweep(Path(arguments.run_dir)) else track_run
    report = upload(arguments.run_dir)
    return {"uri": report.uri, "run_id": report.run_id, "experiment": report.experiment, "status": report.status}


def demo(arguments: Namespace) -> Answer:
    """Run `metagmvae demo`."""
    from metagmvae.infra.workflows.demo import run_demo

    return run_demo(Path(arguments.out), arguments.workers)
