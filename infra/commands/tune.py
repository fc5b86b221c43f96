"""`tune` searches for good settings with many short training runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from metagmvae.infra.commands.parsing import DRY_RUN_HELP, Answer, Parsers, add_command, progress_bar
from metagmvae.pipelines.optional_packages import optional_package


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    example = (
        "metagmvae tune omniglot-cpu --space core --search tpe --trials 40 --steps 400 --set validation.every=100 "
        "--set data.uri=data/omniglot --out runs/sweep"
    )
    what = "search for good settings with many short training runs, ranked by validation accuracy"
    parser = add_command(parsers, "tune", tune, what, example, "finished trials are kept; --resume continues")
    parser.add_argument("config", metavar="CONFIG", help="TOML file or preset with the settings of all trials")
    help_text = "TOML file or bundled search space (core, wide)"
    parser.add_argument("--space", required=True, metavar="SPACE", help=help_text)
    parser.add_argument("--search", choices=("random", "grid", "tpe"), default="random", help="(random)")
    help_text = "asha: stop the worse trials early; none: train all to the end (asha)"
    parser.add_argument("--scheduler", choices=("asha", "none"), default="asha", help=help_text)
    help_text = "total number of trials, those before a resume included (20; grid: all combinations)"
    parser.add_argument("--trials", type=int, metavar="N", help=help_text)
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each trial, as train.steps")
    parser.add_argument("--hours", type=float, metavar="H", help="time limit; --resume continues (no limit)")
    help_text = "number of simultaneous trials (auto: as many as the CPUs and GPUs allow)"
    parser.add_argument("--workers-at-once", default="auto", metavar="N", help=help_text)
    help_text = "GPUs for each trial; 0.5: two trials share a GPU (1 if there are GPUs)"
    parser.add_argument("--gpus-per-trial", type=float, metavar="G", help=help_text)
    help_text = "few-shot task whose accuracy ranks the trials (first of validation.shots)"
    parser.add_argument("--task", metavar="5w1s", help=help_text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (0)")
    parser.add_argument("--name", help="name of the sweep in MLflow (name of its folder)")
    parser.add_argument("--out", metavar="DIR", help="folder of the sweep (runs/CONFIG-SPACE)")
    help_text = "which checkpoints to keep: of the best trial, or of all trials (best)"
    parser.add_argument("--keep", choices=("best", "all"), default="best", help=help_text)
    help_text = "override a setting of all trials; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help_text)
    parser.add_argument("--resume", action="store_true", help="continue the sweep in the folder")
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)


def tune(arguments: Namespace) -> Answer:
    """Run `metagmvae tune`."""
    from metagmvae.configs.load import SettingsError, load_settings
    from metagmvae.configs.search_space import load_space

    with optional_package("optuna", "metagmvae tune"):
        from metagmvae.infra.tune.request import SweepRequest, run

    steps = [] if arguments.steps is None else [f"train.steps={arguments.steps}"]
    settings = load_settings(arguments.config, [*arguments.overrides, *steps])
    space = load_space(arguments.space)
    at_once = arguments.workers_at_once
    if at_once != "auto" and (not at_once.isdigit() or at_once == "0"):
        raise SettingsError(f"--workers-at-once is {at_once}; give auto or a number of trials")
    keys = ("search", "scheduler", "trials", "hours", "seed", "resume", "dry_run")
    request = SweepRequest(
        base=settings,
        space=space,
        out=Path(arguments.out or f"runs/{settings.name}-{space.name}").absolute(),
        name=arguments.name or "",
        at_once=0 if at_once == "auto" else int(at_once),
        gpus=arguments.gpus_per_trial,
        task=arguments.task or "",
        keep_all=arguments.keep == "all",
        **{key: getattr(arguments, key) for key in keys},
    )
    with progress_bar("trials", arguments.quiet or arguments.json) as progress:
        return run(request, progress)
