"""`promote`, `models` and `serve`: the commands of the model registry."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from metagmvae.configs.credentials import redact
from metagmvae.infra.commands.encoder import add_head
from metagmvae.infra.commands.models import MODEL_HELP
from metagmvae.infra.commands.parsing import (
    MODE_HELP,
    Answer,
    FailedAnswer,
    Parsers,
    add_command,
    add_tracking,
    progress_bar,
)
from metagmvae.pipelines.records import DataError

SUCCESSFUL = ("promoted", "would be promoted", "rolled back", "would be rolled back")

RULE = (
    "Make a model the champion of a registered model if it is better. Challenger and champion are evaluated on the "
    "same episodes. On the first task the 95% interval of the paired difference must lie above zero (with "
    "--allow-equal: above -MARGIN), on the other tasks above -MARGIN. Otherwise the alias stays and the exit status is "
    "1. If no version has the alias yet, the challenger gets it. The evidence is stored with the challenger's version "
    "and run."
)


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_promote(parsers)
    example = "metagmvae models omniglot"
    description = "list registered versions with their aliases, results, promotions and the state of their datasets"
    parser = add_command(parsers, "models", models, description, example)
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="one registered model (default: all)")
    add_tracking(parser)
    example = "metagmvae serve models:/omniglot@champion --port 5001"
    description = "answer few-shot requests over HTTP with a model, by MLflow's scoring server"
    parser = add_command(parsers, "serve", serve, description, example)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    help_text = "address to listen on; 0.0.0.0: all addresses of this machine (default: 127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", help=help_text)
    parser.add_argument("--port", type=int, default=5001, help="port; 0: any free one (default: 5001)")
    add_head(parser, "the one that it was calibrated with, or nearest-mean")
    add_tracking(parser)


def _add_promote(parsers: Parsers) -> None:
    example = "metagmvae promote models:/omniglot/3 --data data/omniglot --shots 1 5"
    description = "make a model the champion of a registered model if it is better on the same episodes"
    interrupted = "`metagmvae models` shows whether the alias has moved"
    parser = add_command(parsers, "promote", promote, description, example, interrupted)
    parser.description = RULE
    add_argument = parser.add_argument
    help_text = "models:/NAME/VERSION, a run folder, or a folder of `metagmvae encoder`"
    add_argument("challenger", metavar="CHALLENGER", help=help_text)
    add_argument("--over", default="", metavar="MODEL", help="model to compare with (default: that of the alias)")
    add_argument("--data", metavar="URI", help="dataset to evaluate on: the one that both were trained on")
    add_argument("--split", default="validation", help="split to evaluate on (default: validation)")
    add_argument("--way", type=int, default=5, help="classes per episode (default: 5)")
    shots = parser.add_mutually_exclusive_group()
    shots.add_argument("--shot", type=int, default=1, help="labelled images per class (default: 1)")
    help_text = "several tasks; the challenger must be better on the first one"
    shots.add_argument("--shots", type=int, nargs="+", metavar="SHOT", help=help_text)
    add_argument("--query", type=int, default=15, help="query images per class (default: 15)")
    add_argument("--episodes", type=int, default=1000, help="episodes per task (default: 1000)")
    add_argument("--seed", type=int, default=0, help="seed of the episodes (default: 0)")
    add_argument("--mode", choices=("transductive", "inductive"), default="transductive", help=MODE_HELP)
    add_head(parser)
    add_argument("--allow-equal", action="store_true", help="promote if not worse: interval above -MARGIN")
    help_text = "fraction of accuracy (default: 0.005, half a percentage point)"
    add_argument("--margin", type=float, default=0.005, help=help_text)
    add_argument("--other-data", action="store_true", help="accept models that were trained on other data")
    add_argument("--alias", default="champion", help="alias to move (default: champion)")
    help_text = "registered model for a run folder (default: tracking.register_as of the run)"
    add_argument("--name", default="", help=help_text)
    add_argument("--dry-run", action="store_true", help="evaluate and decide, but write nothing")
    help_text = "move the alias back; CHALLENGER is models:/NAME@ALIAS, and no dataset is needed"
    add_argument("--rollback", action="store_true", help=help_text)
    add_tracking(parser)


def promote(arguments: Namespace) -> Answer:
    """Run `metagmvae promote`."""
    if arguments.rollback:
        from metagmvae.infra.registry.rollback import roll_back

        answer = roll_back(arguments.challenger, arguments.alias, arguments.dry_run)
    else:
        answer = _promote(arguments)
    return answer if answer["decision"] in SUCCESSFUL else FailedAnswer(answer)


def _promote(arguments: Namespace) -> Answer:
    from metagmvae.evaluation.comparison.head_to_head import open_plan
    from metagmvae.infra.registry.promote import PromotionRequest
    from metagmvae.infra.registry.promote import promote as promote_challenger

    if not arguments.data:
        raise DataError("--data is missing; name the dataset to evaluate on")
    shared = {key: getattr(arguments, key) for key in ("way", "query", "episodes", "seed")}
    tasks = [{**shared, "shot": shot} for shot in arguments.shots or [arguments.shot]]
    options = {key: getattr(arguments, key) for key in ("mode", "head", "other_data")}
    progress = partial(progress_bar, quiet=arguments.json)
    plan = open_plan(arguments.data, arguments.split, tasks, progress=progress, **options)
    keys = ("challenger", "over", "alias", "name", "allow_equal", "margin", "dry_run")
    return promote_challenger(PromotionRequest(**{key: getattr(arguments, key) for key in keys}), plan)


def models(arguments: Namespace) -> Answer:
    """Run `metagmvae models`."""
    from metagmvae.configs.schema import TrackingSettings
    from metagmvae.infra.registry.listing import list_models, table_row
    from metagmvae.infra.tracking.store import connect

    store = connect(TrackingSettings(), create=False)
    with progress_bar("registered versions", arguments.json) as on_progress:
        rows = list_models(store, arguments.name, on_progress)
    return {"store": redact(store.uri), "models": rows if arguments.json else [table_row(row) for row in rows]}


def serve(arguments: Namespace) -> Answer:
    """Run `metagmvae serve`."""
    from metagmvae.infra.registry.resolve import resolve_model
    from metagmvae.infra.registry.serve import listen
    from metagmvae.infra.registry.serve import serve as serve_model

    with listen(arguments.host, arguments.port) as listener:
        return serve_model(resolve_model(arguments.model), listener, arguments.model, arguments.head)
