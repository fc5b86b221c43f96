"""Standard streams and log lines of a command. What cannot be shown or written does not end its work."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from metagmvae.configs.credentials import redact
from metagmvae.pipelines.output_target import cannot_write, output_mode
from metagmvae.pipelines.records import printable

LOG = logging.getLogger("metagmvae")
QUIET, USUAL = logging.WARNING, logging.INFO


def prepare_streams() -> None:
    """Open what the caller has closed, and escape characters that a stream cannot show."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The null device gets the lowest free descriptor: else the next file would be "standard output".
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not a text stream, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def write_line(text: str, stream: TextIO) -> str:
    """Print and flush; return the reason if the stream cannot be written, and discard what follows.

    The reason is empty if the reader of a pipe has gone: it has what it wants (`metagmvae … | head -1`).
    """
    return _attempt(lambda: print(text, file=stream, flush=True), stream)


def flush_streams() -> str:
    """Flush both streams, so that the interpreter has nothing left to fail with; return the reason as `write_line`."""
    _attempt(sys.stderr.flush, sys.stderr)
    return _attempt(sys.stdout.flush, sys.stdout)


def _attempt(write: Callable[[], None], stream: TextIO) -> str:
    try:
        write()
    except BrokenPipeError:
        _discard(stream)
    except OSError as error:
        _discard(stream)
        return error.strerror or str(error)
    return ""


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream to the null device."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _OneLine(logging.Formatter):
    """One line for each message, without credentials and control characters; tracebacks only in a log file."""

    def __init__(self, pattern: str, *, tracebacks: bool) -> None:
        super().__init__(pattern)
        self.tracebacks = tracebacks

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(redact(super().formatMessage(record)))

    def formatException(self, trace: object) -> str:
        return redact(super().formatException(trace)) if self.tracebacks else ""  # type: ignore[arg-type]

    def format(self, record: logging.LogRecord) -> str:
        if not self.tracebacks:
            record = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        return super().format(record)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to the standard error of the moment, and stays silent if it cannot be written."""

    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record), sys.stderr)


def start_logging(arguments: argparse.Namespace) -> None:
    """Send the log lines of this program to standard error and to `--log-file`.

    Raises:
        DataError: the log file cannot be written.
    """
    close_logging()
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False  # MLflow and Ray have handlers of their own
    console = _StandardError()
    console.setLevel(logging.DEBUG if arguments.verbose else QUIET if arguments.quiet else USUAL)
    console.setFormatter(_OneLine("%(asctime)s %(message)s" if arguments.verbose else "%(message)s", tracebacks=False))
    LOG.addHandler(console)
    if arguments.log_file:
        file = _LogFile(_open_log(arguments.log_file))
        file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", tracebacks=True))
        LOG.addHandler(file)


class _LogFile(logging.StreamHandler[TextIO]):
    """Writes to the log file; a disk that is full does not end the command."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()
        super().close()


def _open_log(path: str) -> TextIO:
    output_mode(path)
    try:
        # Without blocking: opening a pipe would wait for its reader.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
    except OSError as error:
        raise cannot_write(f"--log-file {path}", error, "choose another file") from error
    return os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace")


def close_logging() -> None:
    """Remove the handlers of `start_logging` and give the logger back as it was."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    LOG.setLevel(logging.NOTSET)
    LOG.propagate = True


class LoggedProgress:
    """Logs the progress of long work every 30 s: for a log file, or where no terminal shows a progress bar."""

    INTERVAL_S = 30.0

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` parts are finished."""
        now = time.monotonic()
        if now - self.last < self.INTERVAL_S:
            return
        self.last = now
        left = f", about {(now - self.start) * (total - done) / done:,.0f} s left" if done else ""
        LOG.info("%s: %s of %s%s", self.title, f"{done:,}", f"{total:,}", left)


def answer_text(answer: object) -> str:
    """The JSON of an answer; a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(answer), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value
