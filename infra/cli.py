"""The `metagmvae` command. Heavy packages are imported only by the command that needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress

from metagmvae.infra.commands import check, compare, data, features, models, registry, train, tune
from metagmvae.infra.commands.parsing import FailedAnswer, Parser, format_answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong request, 130 interrupted."""
    with suppress(AttributeError, ValueError):  # not a text stream, or closed
        # A name that is not UTF-8, or a terminal that is not, must not end a command that has done its work.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = build_parser()
    arguments = parser.parse_args([_local_path(text, parser) for text in (sys.argv[1:] if argv is None else argv)])
    try:
        answer = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, and --resume continues a training", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        if type(error).__module__.split(".")[0] != "metagmvae":
            reason = ": ".join([type(error).__name__, *str(error)[:300].splitlines()[:1]])
            unexpected = f"unexpected error in {arguments.command}: {reason}; --debug shows the traceback"
            print(f"metagmvae: {unexpected}", file=sys.stderr)
            return 1
        print(f"metagmvae {arguments.command}: {error}", file=sys.stderr)
        # The ValueErrors of this package (one line each) are wrong requests; its other errors are failures.
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps(answer) if arguments.json else format_answer(answer))
    return 1 if isinstance(answer, FailedAnswer) else 0


def _local_path(argument: str, parser: Parser) -> str:
    """Replace `file:///…` by a path in an argument or in the value of an option, so that every command accepts it."""
    option, equals, value = argument.partition("=")
    if not (option.startswith("--") and equals):
        option, equals, value = "", "", argument
    if not value.startswith("file://"):
        return argument
    from metagmvae.pipelines.files import local_folder

    try:
        return f"{option}{equals}{local_folder(value)}"
    except ValueError as error:
        parser.error(str(error))


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="metagmvae", description="Unsupervised meta-learning with Meta-GMVAE.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (data, features, train, tune, models, compare, registry, check):
        group.add(parsers)
    return parser
