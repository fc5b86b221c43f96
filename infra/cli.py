"""`metagmvae`: the commands. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from metagmvae.infra.commands import check, compare, data, features, models, registry, train, tune
from metagmvae.infra.commands.parsing import FailedAnswer, Parser, format_answer


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
        return 2 if type(error).__module__.split(".")[0] == "metagmvae" and isinstance(error, ValueError) else 1
    print(json.dumps(answer) if arguments.json else format_answer(answer))
    return 1 if isinstance(answer, FailedAnswer) else 0


def _parser() -> Parser:
    parser = Parser(prog="metagmvae", description="Unsupervised meta-learning with Meta-GMVAE.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (data, features, train, tune, models, compare, registry, check):
        group.add(parsers)
    return parser
