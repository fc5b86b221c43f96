"""One training at a time in a run folder; the system lets go of the folder when the process dies."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metagmvae.infra.runs.run_folder import TRAINING_LOCK
from metagmvae.pipelines.records import DataError

POLL_S = 0.2


@contextmanager
def lock_run_folder(run_dir: Path, *, setting: str = "--set run.out=…", patience_s: float = 0.0) -> Iterator[None]:
    """Hold a run folder while a training writes to it.

    Args:
        run_dir: the folder, which is there.
        setting: by which another folder is chosen, for the message.
        patience_s: seconds to wait for another process to let go.

    Raises:
        DataError: another process trains there.
    """
    until = time.monotonic() + patience_s
    with (run_dir / TRAINING_LOCK).open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    text = f"{run_dir}: another process trains there; wait for it, or choose another folder: {setting}"
                    raise DataError(text) from error
                time.sleep(POLL_S)
        yield
