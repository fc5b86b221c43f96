"""`pretrain`, `train`, `track` and `demo`."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from metagmvae.infra.commands.parsing import Answer, Parsers, add_command

if TYPE_CHECKING:
    from metagmvae.training.trainer.stages import ModelKind


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = "metagmvae train omniglot-cpu --set data.uri=data/omniglot --set run.out=runs/first"
    _add_run(parsers, "train", train, "meta-train; CONFIG is a TOML file or a preset", example)
    example = "metagmvae pretrain mini-imagenet-cpu --set data.uri=data/mini-imagenet --set run.out=runs/simclr"
    _add_run(parsers, "pretrain", pretrain, "train an encoder alone by contrast (SimCLR)", example)

    example = "metagmvae track runs/first"
    parser = add_command(parsers, "track", track, "send a run or a sweep to MLflow: what is not there yet", example)
    parser.add_argument("run_dir", metavar="RUN_DIR")

    parser = add_command(parsers, "demo", demo, "the whole way on generated glyphs", "metagmvae demo --out my-demo")
    parser.add_argument("--out", default="metagmvae-demo", help="new folder for everything the demo makes")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers that train")


def _add_run(parsers: Parsers, name: str, run: Callable[[Namespace], Answer], what: str, example: str) -> None:
    parser = add_command(parsers, name, run, what, example)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.out")
    parser.add_argument("--quiet", action="store_true", help="no live line")


def train(arguments: Namespace) -> Answer:
    """Run `metagmvae train`."""
    return _run(arguments, "meta-gmvae")


def pretrain(arguments: Namespace) -> Answer:
    """Run `metagmvae pretrain`."""
    return _run(arguments, "encoder")


def _run(arguments: Namespace, kind: ModelKind) -> Answer:
    from metagmvae.configs.load import load_settings
    from metagmvae.infra.runs.run_folder import METRICS, read_lines
    from metagmvae.infra.workflows.run_training import run_training

    settings = load_settings(arguments.config, arguments.overrides)
    quiet = arguments.quiet or arguments.json
    run_dir = run_training(settings, kind=kind, resume=arguments.resume, quiet=quiet)
    last = read_lines(run_dir / METRICS)[-1]
    answer: Answer = {"run": str(run_dir), "last": last}
    if settings.tracking.enabled and settings.tracking.register_as:
        from metagmvae.infra.registry.register import register

        name = settings.tracking.register_as + ("-encoder" if kind == "encoder" else "")
        version = register(run_dir, settings.tracking, name)
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
    from metagmvae.infra.tracking.run_tracker import track as send
    from metagmvae.infra.tune.sweep_folder import SWEEP
    from metagmvae.infra.tune.sweep_uploader import track_sweep

    report = (track_sweep if (Path(arguments.run_dir) / SWEEP).is_file() else send)(arguments.run_dir)
    return {"uri": report.uri, "run_id": report.run_id, "experiment": report.experiment, "status": report.status}


def demo(arguments: Namespace) -> Answer:
    """Run `metagmvae demo`."""
    from metagmvae.infra.workflows.demo import run_demo

    return run_demo(Path(arguments.out), arguments.workers)
