"""Shared by all commands: a parser with one-line errors, formatting of the answer, a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from metagmvae.pipelines.records import ProgressCallback

Answer = dict[str, Any]
"""What a command returns: a dictionary that `--json` prints as one object."""
Parsers = Any
"""The sub-parsers of argparse, which have no public type."""

MODE_HELP = (
    "transductive: the queries of an episode are classified together; inductive: each query alone "
    "(default: transductive)"
)


class FailedAnswer(dict[str, Any]):
    """An answer that reports damage or a failed check: it is printed as usual, but the exit code is 1."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong request in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the description, but not the example: argparse would break its lines at hyphens."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Example:") else super()._fill_text(text, width, indent)


def add_command(
    parsers: Parsers, name: str, run: Callable[[argparse.Namespace], Answer], description: str, example: str
) -> argparse.ArgumentParser:
    """Add a command with `--json`, `--debug` and an example in its help."""
    parser: argparse.ArgumentParser = parsers.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=f"Example:\n  {example}",
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback if the command fails")
    return parser


def format_answer(answer: Answer) -> str:
    """Format an answer as text: one `key: value` per line, lists of dictionaries as tables; no control characters."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{key}:")
            lines += _table(value)
        elif isinstance(value, str) and "\n" in value:
            lines += [_printable(line) for line in value.split("\n")]
        else:
            lines.append(f"{key}: {_plain(value)}")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_printable(name) for name in names], *([_plain(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{_printable(str(k))} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    return _printable(str(value))


def _printable(text: str) -> str:
    from metagmvae.pipelines.records import printable  # imports NumPy, which `--help` does not need

    return printable(text)


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """Show a progress bar on stderr and yield its update function; yield None if stderr is no terminal or `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
