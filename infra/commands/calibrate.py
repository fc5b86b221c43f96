"""`calibrate`: makes the probabilities of a trained model agree with its accuracy."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from metagmvae.infra.commands.encoder import add_head
from metagmvae.infra.commands.models import MODEL_HELP
from metagmvae.infra.commands.parsing import Answer, Parsers, add_command, progress_bar
from metagmvae.pipelines.records import DataError


def add(parsers: Parsers) -> None:
    """Add the command of this module to the parser."""
    example = "metagmvae calibrate runs/first --data data/omniglot"
    description = "fit the map that calibrates the probabilities of a model, and the level for queries of no labelled "
    description += "class, on validation episodes, and store both with the model; predictions do not change"
    parser = add_command(parsers, "calibrate", calibrate, description, example)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    help_text = "dataset with labels, which are used for nothing else"
    parser.add_argument("--data", required=True, metavar="URI", help=help_text)
    help_text = "split whose classes are used (default: the validation split of the model, or augmented training "
    help_text += "images where it has no labelled classes)"
    parser.add_argument("--split", help=help_text)
    parser.add_argument("--way", type=int, nargs="+", default=[5], metavar="K", help="classes per episode (default: 5)")
    help_text = "labelled images per class; each has a map of its own (default: 1 5)"
    parser.add_argument("--shot", type=int, nargs="+", default=[1, 5], metavar="S", help=help_text)
    parser.add_argument("--query", type=int, default=15, metavar="Q", help="queries per class (default: 15)")
    help_text = "episodes for each way, shot and mode (default: 100)"
    parser.add_argument("--episodes", type=int, default=100, metavar="N", help=help_text)
    parser.add_argument("--seed", type=int, default=1, help="seed of the episodes (default: 1)")
    help_text = "only the probabilities: `classify --unknown` and `evaluate --open` then have no level to use"
    parser.add_argument("--no-unknown", action="store_true", help=help_text)
    add_head(parser)
    help_text = "new folder for a model package with the calibration (default: store it in MODEL; a registered model "
    help_text += "cannot change, so it needs --out)"
    parser.add_argument("--out", metavar="DIR", help=help_text)


def calibrate(arguments: Namespace) -> Answer:
    """Run `metagmvae calibrate`."""
    from metagmvae.evaluation.uncertainty.fit_calibration import CalibrationPlan
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.workflows.calibrate import calibrate_path, calibrate_to_package
    from metagmvae.pipelines.shards.dataset import Dataset

    numbers = {"way": (arguments.way, 2), "shot": (arguments.shot, 1), "query": ([arguments.query], 1)}
    for name, (values, least) in (numbers | {"episodes": ([arguments.episodes], 1)}).items():
        if min(values) < least:
            raise DataError(f"--{name} {min(values)}: must be at least {least}")
    dataset = Dataset.open(arguments.data)
    tasks = (tuple(arguments.way), tuple(arguments.shot), arguments.query)
    plan = CalibrationPlan(*tasks, arguments.episodes, arguments.seed, background=not arguments.no_unknown)
    progress = partial(progress_bar, quiet=arguments.json)
    options = {"split": arguments.split, "head": arguments.head, "progress": progress}
    if arguments.out:
        return calibrate_to_package(resolve_model(arguments.model), dataset, plan, Path(arguments.out), **options)
    if not Path(arguments.model).exists():
        resolve_model(arguments.model)  # a reference that does not exist is a better reason
        raise DataError(
            f"{arguments.model}: a registered model cannot change; write a calibrated package with --out DIR"
        )
    return calibrate_path(Path(arguments.model), dataset, plan, **options)
