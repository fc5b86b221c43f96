"""Exclusive lock on a run folder. The operating system releases it when the process dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from metagmvae.infra.runs.launcher import tasks_of_slurm
from metagmvae.infra.runs.run_folder import TRAINING_LOCK
from metagmvae.pipelines.files import held_lock
from metagmvae.pipelines.records import DataError


@contextmanager
def lock_run_folder(run_dir: Path, *, setting: str = "--set run.out=…", patience_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of a run folder while a training writes to it.

    Args:
        run_dir: the folder, which must exist.
        setting: option that chooses another folder, for the message.
        patience_s: seconds to wait for another process to release the lock.

    Raises:
        DataError: another process trains in the folder, or it cannot be locked.
    """
    try:
        with held_lock(run_dir / TRAINING_LOCK, patience_s):
            yield
    except Timeout as error:
        raise DataError(
            f"{run_dir}: another process trains in this folder; wait for it, or choose another folder: {setting}"
            f"{tasks_of_slurm()}"
        ) from error


def check_not_in_use(run_dir: Path, *, setting: str = "--set run.out=…") -> None:
    """Check early, before Ray starts, that no process trains in a run folder; nothing is created.

    Raises:
        DataError: as `lock_run_folder`.
    """
    if (run_dir / TRAINING_LOCK).exists():
        with lock_run_folder(run_dir, setting=setting):
            pass
