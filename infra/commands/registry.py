"""`promote` and `models`: the registry."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from metagmvae.infra.commands.parsing import Answer, FailedAnswer, Parsers, add_command, progress_bar

GOOD = ("promoted", "would be promoted", "rolled back", "would be rolled back")

RULE = (
    "Make a model the champion if it is better. Both are judged on the same episodes; the 95 % interval of the paired "
    "difference must lie wholly above zero on the first task (with --allow-equal above -MARGIN), and above -MARGIN on "
    "the others. Otherwise nothing moves and the exit status is 1. Where no version has the alias yet, the challenger "
    "gets it. The evidence goes to its registered version and its run."
)


def add(parsers: Parsers) -> None:
    """Add the commands of this module to the parser."""
    _add_promote(parsers)
    example = "metagmvae models omniglot"
    what = "versions of registered models, their aliases, their evidence, and whether its data are still there"
    parser = add_command(parsers, "models", models, what, example)
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="of one registered model (all)")


def _add_promote(parsers: Parsers) -> None:
    example = "metagmvae promote models:/omniglot/3 --data data/omniglot --shots 1 5"
    what = "make a model the champion of a registered model, if it is better on the same episodes"
    parser = add_command(parsers, "promote", promote, what, example)
    parser.description = RULE
    parser.add_argument("challenger", metavar="CHALLENGER", help="models:/NAME/VERSION, or a run folder")
    parser.add_argument("--over", default="", metavar="MODEL", help="what to be better than (the alias of that name)")
    parser.add_argument("--data", metavar="URI", help="data set to judge on: the one that both were trained on")
    parser.add_argument("--split", default="validation", help="whose classes; test is for results (validation)")
    parser.add_argument("--way", type=int, default=5)
    shots = parser.add_mutually_exclusive_group()
    shots.add_argument("--shot", type=int, default=1)
    shots.add_argument("--shots", type=int, nargs="+", metavar="SHOT", help="several tasks, the first matters most")
    parser.add_argument("--query", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("transductive", "inductive"), default="transductive")
    parser.add_argument("--allow-equal", action="store_true", help="not worse is enough: the interval above -MARGIN")
    parser.add_argument("--margin", type=float, default=0.005, help="a share of accuracy (0.005: half a point)")
    parser.add_argument("--other-data", action="store_true", help="models may have been trained on other data")
    parser.add_argument("--alias", default="champion", help="what is moved (champion)")
    parser.add_argument("--name", default="", help="registered model for a run folder (tracking.register_as)")
    parser.add_argument("--dry-run", action="store_true", help="judge and decide, and write nothing")
    parser.add_argument("--rollback", action="store_true", help="CHALLENGER is models:/NAME@ALIAS: back to the former")


def promote(arguments: Namespace) -> Answer:
    """Run `metagmvae promote`."""
    if arguments.rollback:
        from metagmvae.infra.registry.rollback import roll_back

        answer = roll_back(arguments.challenger, arguments.alias, arguments.dry_run)
    else:
        answer = _promote(arguments)
    return answer if answer["decision"] in GOOD else FailedAnswer(answer)


def _promote(arguments: Namespace) -> Answer:
    from metagmvae.evaluation.comparison.head_to_head import open_plan
    from metagmvae.infra.registry.promote import PromotionRequest
    from metagmvae.infra.registry.promote import promote as decide
    from metagmvae.pipelines.records import DataError

    if not arguments.data:
        raise DataError("promote: name the data set to judge on with --data")
    same = {key: getattr(arguments, key) for key in ("way", "query", "episodes", "seed")}
    tasks = [{**same, "shot": shot} for shot in arguments.shots or [arguments.shot]]
    how = {key: getattr(arguments, key) for key in ("mode", "other_data")}
    progress = partial(progress_bar, quiet=arguments.json)
    course = open_plan(arguments.data, arguments.split, tasks, progress=progress, **how)
    keys = ("challenger", "over", "alias", "name", "allow_equal", "margin", "dry_run")
    return decide(PromotionRequest(**{key: getattr(arguments, key) for key in keys}), course)


def models(arguments: Namespace) -> Answer:
    """Run `metagmvae models`."""
    from metagmvae.configs.schema import TrackingSettings
    from metagmvae.infra.registry.listing import list_models, short
    from metagmvae.infra.tracking.store import connect, redact

    store = connect(TrackingSettings(), create=False)
    with progress_bar("registered versions", arguments.json) as on_progress:
        rows = list_models(store, arguments.name, on_progress)
    return {"store": redact(store.uri), "models": rows if arguments.json else [short(row) for row in rows]}
