"""Ctrl-C and SIGTERM: both end a command in the same way, and a training at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


def raise_signal(number: int, frame: FrameType | None = None) -> None:
    """Signal handler: raise KeyboardInterrupt for Ctrl-C, `Terminated` for SIGTERM."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def explain_stop(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Return the line about a command that a signal stopped, and its exit code, 130 or 143.

    The notes of the exception say what is kept and what continues the work.
    """
    name, number = ("SIGTERM", signal.SIGTERM) if isinstance(stop, Terminated) else ("Ctrl-C", signal.SIGINT)
    notes = getattr(stop, "__notes__", []) or ["nothing was changed by halves; run the command again"]
    return f"stopped by {name}: {'; '.join(notes)}", 128 + number


@contextmanager
def raised_signals() -> Iterator[None]:
    """A block in which both signals raise an exception at once; outside of the main thread nothing changes."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise_signal(number)

    try:
        with _handler(note):
            yield
    except KeyboardInterrupt as stop:
        if signal.SIGTERM in received and not isinstance(stop, Terminated):
            terminated = Terminated()  # a library such as Ray has replaced it by a plain KeyboardInterrupt
            for text in getattr(stop, "__notes__", []):
                terminated.add_note(text)
            raise terminated from stop
        raise


@contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """A block in which the first signal only makes the yielded function return True; the second one raises at once.

    Raises:
        KeyboardInterrupt, Terminated: at the end of the block, if there was a signal.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise_signal(number)

    try:
        with _handler(note):
            yield lambda: bool(received)
    except KeyboardInterrupt as stop:
        if received and not isinstance(stop, Terminated):
            raise_signal(received[0])
        raise
    if received:
        raise_signal(received[0])


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that the parent process has switched off (nohup, a background job of a shell script) stays off.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: earlier for number, earlier in before.items() if earlier not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
