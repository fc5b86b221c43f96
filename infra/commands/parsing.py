"""Shared by all commands: a parser with one-line errors, formatting of the answer, a progress bar."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from metagmvae.configs.credentials import redact, with_credentials
from metagmvae.configs.suggestions import similar, suggestion
from metagmvae.evaluation.provenance import version_line
from metagmvae.infra.commands.output import LoggedProgress, write_line
from metagmvae.pipelines.output_target import check_output
from metagmvae.pipelines.records import DataError, printable

if TYPE_CHECKING:
    from metagmvae.pipelines.records import ProgressCallback

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
Answer = dict[str, Any]
"""What a command returns: a dictionary that `--json` prints as one object."""
Parsers = Any
"""The sub-parsers of argparse, which have no public type."""

MODE_HELP = (
    "transductive: the queries of an episode are classified together; inductive: each query alone "
    "(default: transductive)"
)

MIX_GROUPS_HELP = (
    "draw labelled images and queries regardless of the groups of the dataset, such as patients, for comparison; by "
    "default they are of different groups"
)

DRY_RUN_HELP = "check everything that can be checked before the start, say what would be done, and write nothing"


class FailedAnswer(dict[str, Any]):
    """An answer that reports damage or a failed check: it is printed as usual, but the exit code is 1."""


class WrongOptions(SystemExit):
    """Exit code 2 for options that cannot be parsed, after the reason has been printed."""

    def __init__(self, reason: str) -> None:
        super().__init__(2)
        self.reason = reason


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong request in one line, with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        write_line(printable(redact(f"{self.prog}: {message}; see `{self.prog} --help`")), sys.stderr)
        raise WrongOptions(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help; argparse itself would not notice that it cannot be written."""
        if write_line(message.rstrip("\n"), file or sys.stderr):
            raise SystemExit(1)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words; an unknown option is an error of the command that it was given to."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self._subparsers_by_name()[arguments.command]
            options = [option for action in parser._actions for option in action.option_strings]
            word = unknown[0].partition("=")[0]
            hint = suggestion(word, options) if similar(word, options) else ""
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return arguments

    def _subparsers_by_name(self) -> dict[str, Parser]:
        return next((action.choices for action in self._actions if isinstance(action.choices, dict)), {})

    def parsers(self) -> Iterator[Parser]:
        """Yield this parser and those of its commands, and of their actions."""
        yield self
        for parser in self._subparsers_by_name().values():
            yield from parser.parsers()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        hint = suggestion(str(value), list(map(str, action.choices)))
        if isinstance(action.choices, dict):
            raise argparse.ArgumentError(None, f"{value!r} is no command{hint}")
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")


def complete(parser: Parser) -> None:
    """Answer a shell that asks for completions (argcomplete) and exit; without argcomplete there are none."""
    from metagmvae.configs.load import presets

    with suppress(ImportError):
        import argcomplete

        parsers = list(parser.parsers())
        for action in (action for each in parsers for action in each._actions if action.metavar == "CONFIG"):
            vars(action)["completer"] = argcomplete.ChoicesCompleter(presets())
        argcomplete.autocomplete(parser)


class VersionAction(argparse.Action):
    """`--version`: prints one line with the versions of the program, Python and PyTorch."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        raise SystemExit(1 if write_line(version_line(), sys.stdout) else 0)


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the description, but not the example: argparse would break its lines at hyphens."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Example:") else super()._fill_text(text, width, indent)


def add_command(
    parsers: Parsers,
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    description: str,
    example: str,
    interrupted: str = "",
) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have, and an example in its help.

    `interrupted` says after Ctrl-C what is kept, if that is more than nothing.
    """

    def run_alone(arguments: argparse.Namespace) -> Answer:
        from metagmvae.infra.runs.launcher import check_launcher

        check_launcher(name)
        return run(arguments)

    parser: argparse.ArgumentParser = parsers.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=f"Example:\n  {example}",
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=run_alone, interrupted=interrupted)
    common = parser.add_argument_group("options of all commands")
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--debug", action="store_true", help="show the traceback if the command fails")
    common.add_argument("-v", "--verbose", action="store_true", help="log more, with times")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, and only warnings and errors")
    help_text = "append the log to a file, with times and the tracebacks of errors"
    common.add_argument("--log-file", metavar="FILE", help=help_text)
    return parser


def add_tracking(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command, which then runs as if MLFLOW_TRACKING_URI were set to its value."""
    help_text = f"MLflow store, for example http://HOST:5000 (default: {TRACKING_VARIABLE}, else runs/mlflow)"
    parser.add_argument("--tracking", metavar="URI", default="", help=help_text)
    run: Callable[[argparse.Namespace], Answer] = parser.get_default("run")

    def run_with_store(arguments: argparse.Namespace) -> Answer:
        before = os.environ.get(TRACKING_VARIABLE)
        if arguments.tracking:
            os.environ[TRACKING_VARIABLE] = with_credentials(arguments.tracking)
        try:
            return run(arguments)
        finally:
            os.environ.pop(TRACKING_VARIABLE, None)
            if before is not None:
                os.environ[TRACKING_VARIABLE] = before

    parser.set_defaults(run=run_with_store)


def output_file(path: str) -> str:
    """Type of an option that names a file to write: refuses at once what cannot be written to.

    Raises:
        argparse.ArgumentTypeError: it is a folder, a socket or a disk, or its folder cannot be written.
    """
    try:
        check_output(path)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def format_answer(answer: Answer) -> str:
    """Format an answer as text: one `key: value` per line, lists of dictionaries as tables; no control characters."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{key}:")
            lines += _table(value)
        elif isinstance(value, str) and "\n" in value:
            lines += [printable(line) for line in value.split("\n")]
        else:
            lines.append(f"{key}: {_cell(key, value)}")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [printable(name) for name in names],
        *([_cell(name, row.get(name, "")) for name in names] for row in rows),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def _cell(name: str, value: Any) -> str:
    return "no interval" if value is None and name.endswith("ci95") else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        if 0 < abs(value) < 0.001:  # four decimals would show nothing of it
            return f"{value:.3g}"
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{printable(str(k))} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    return printable(str(value))


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """Show a progress bar on stderr and yield its update function; yield None if `quiet`.

    Without a terminal, a line is logged every 30 s instead, also if `quiet`: the log level decides.
    """
    if not sys.stderr.isatty():
        yield LoggedProgress(title)
        return
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
