"""The `metagmvae` command. Heavy packages are imported only by the command that needs them."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Sequence

from metagmvae.configs.credentials import redact, take_credentials
from metagmvae.infra.commands import (
    calibrate,
    check,
    compare,
    data,
    encoder,
    evaluate,
    features,
    fit,
    models,
    registry,
    train,
    tune,
)
from metagmvae.infra.commands.output import (
    answer_text,
    close_logging,
    flush_streams,
    prepare_streams,
    start_logging,
    write_line,
)
from metagmvae.infra.commands.parsing import (
    Answer,
    FailedAnswer,
    Parser,
    VersionAction,
    WrongOptions,
    complete,
    format_answer,
)
from metagmvae.infra.runs.stop_signals import explain_stop, raised_signals
from metagmvae.pipelines.records import NoSpaceError

LOG = logging.getLogger(__name__)
OS_REMEDIES = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space, and run the command again",
    errno.EDQUOT: "free some space, and run the command again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions, or choose another one",
}
"""For errors of the operating system that are met in a place without a message of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong request, 130 Ctrl-C, 143 SIGTERM."""
    prepare_streams()
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        complete(parser)
    try:
        code = _run(parser, words)
    except SystemExit as stop:  # --help, --version and wrong options
        if isinstance(stop, WrongOptions) and "--json" in words:
            write_line(answer_text(_failure(stop.reason, 2)), sys.stdout)
        if flush_streams():
            raise SystemExit(1) from None
        raise stop from None
    finally:
        close_logging()
    flush_streams()
    return code


def _run(parser: Parser, words: Sequence[str]) -> int:
    arguments = parser.parse_args([public_word(word, parser) for word in words])
    name = f"metagmvae {arguments.command}"
    try:
        start_logging(arguments)
        LOG.debug("metagmvae %s", " ".join(map(redact, words)))
        with raised_signals():
            answer = arguments.run(arguments)
            LOG.debug("%s: done", name)
            return _print(answer, arguments.json, name)
    except KeyboardInterrupt as stop:
        if arguments.interrupted and not getattr(stop, "__notes__", None):
            stop.add_note(arguments.interrupted)
        reason, code = explain_stop(stop)
        LOG.error("%s: %s", name, reason)
    except Exception as error:
        if arguments.debug:
            raise
        reason, code = _explain(error, arguments.command)
        LOG.error("%s: %s", "metagmvae" if reason.startswith("unexpected error") else name, reason, exc_info=True)
    if arguments.json:
        write_line(answer_text(_failure(reason, code)), sys.stdout)
    return code


def _explain(error: Exception, command: str) -> tuple[str, int]:
    """The reason of a failed command in one line, and its exit code.

    The ValueErrors of this package (one line each) are wrong requests; its other errors (and `NoSpaceError`, which is
    both) are failures.
    """
    if type(error).__module__.split(".")[0] == "metagmvae":
        wrong_request = isinstance(error, ValueError) and not isinstance(error, NoSpaceError)
        return str(error).removeprefix(f"{command}: "), 2 if wrong_request else 1
    if isinstance(error, OSError) and error.errno in OS_REMEDIES:
        where = f"{str(error.filename)[:100]}: " if error.filename else ""
        return f"{where}{error.strerror}; {OS_REMEDIES[error.errno]}", 2 if error.errno == errno.ENAMETOOLONG else 1
    reason = ": ".join([type(error).__name__, *str(error)[:300].splitlines()[:1]])
    return f"unexpected error in {command}: {reason}; --debug shows the traceback", 1


def _failure(reason: str, code: int) -> Answer:
    """What `--json` prints on standard output for a command that failed."""
    return {"error": redact(reason), "exit_code": code}


def _print(answer: Answer, as_json: bool, name: str) -> int:
    reason = write_line(answer_text(answer) if as_json else format_answer(answer), sys.stdout)
    if reason:
        LOG.error("%s: the answer cannot be written to standard output (%s)", name, reason)
    return 1 if reason or isinstance(answer, FailedAnswer) else 0


def public_word(word: str, parser: Parser) -> str:
    """A word of the command line, or the value in `--option=value`, as every command takes it.

    `file:///…` becomes a path; the credentials of any other URI are kept in memory. Settings (`--set`) are left to
    their own checks.
    """
    option, equals, value = word.partition("=")
    if not (option.startswith("--") and equals):
        option, equals, value = "", "", word
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        return word
    if not value.startswith("file://"):
        return f"{option}{equals}{take_credentials(value)}"
    from metagmvae.pipelines.files import local_folder

    try:
        return f"{option}{equals}{local_folder(value)}"
    except ValueError as error:
        parser.error(str(error))


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="metagmvae", description="Unsupervised meta-learning with Meta-GMVAE.")
    parser.add_argument("--version", action=VersionAction, help="print the versions of the program and of its basis")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (fit, data, features, encoder, train, tune, calibrate, evaluate, models, compare, registry, check):
        group.add(parsers)
    return parser
