"""`metagmvae`: the commands. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from infra import (
    commands_check,
    commands_compare,
    commands_data,
    commands_features,
    commands_models,
    commands_registry,
    commands_train,
    commands_tune,
)
from infra.command import BadNews, Parser, text

OURS = ("configs", "pipelines", "training", "evaluation", "infra")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        answer = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was finished stays, training goes on with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        # Our own errors are ValueErrors of one line: the request. Anything else: the work.
        print(f"metagmvae {arguments.command}: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2 if type(error).__module__.split(".")[0] in OURS and isinstance(error, ValueError) else 1
    print(json.dumps(answer) if arguments.json else text(answer))
    return 1 if isinstance(answer, BadNews) else 0


def _parser() -> Parser:
    parser = Parser(prog="metagmvae", description="Unsupervised meta-learning with Meta-GMVAE.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (
        commands_data,
        commands_features,
        commands_train,
        commands_tune,
        commands_models,
        commands_compare,
        commands_registry,
        commands_check,
    ):
        group.add(parsers)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
