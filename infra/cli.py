"""The `metagmvae` command. Heavy packages are imported only by the command that needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from metagmvae.infra.commands import check, compare, data, features, models, registry, train, tune
from metagmvae.infra.commands.parsing import FailedAnswer, Parser, format_answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong request, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        answer = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, and --resume continues a training", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        print(f"metagmvae {arguments.command}: {str(error) or type(error).__name__}", file=sys.stderr)
        # The ValueErrors of this package (one line each) are wrong requests; any other error is a failure.
        return 2 if type(error).__module__.split(".")[0] == "metagmvae" and isinstance(error, ValueError) else 1
    print(json.dumps(answer) if arguments.json else format_answer(answer))
    return 1 if isinstance(answer, FailedAnswer) else 0


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="metagmvae", description="Unsupervised meta-learning with Meta-GMVAE.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (data, features, train, tune, models, compare, registry, check):
        group.add(parsers)
    return parser
