"""One training at a time in a run folder; the system lets go of the folder when the process dies."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.records import DataError

LOCK = ".training.lock"


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run folder while a training writes to it.

    Raises:
        DataError: another process trains there.
    """
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"{run_dir}: another process trains there; wait for it, or choose another folder: --set run.out=…"
            raise DataError(text) from error
        yield
