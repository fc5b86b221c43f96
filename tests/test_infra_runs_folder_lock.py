"""Locks on a file system without locks: one line, and no wait."""

import errno
import os

import pytest

from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.tracking.cursor import upload_lock
from metagmvae.infra.tracking.sqlite_store import create_store
from metagmvae.pipelines.files import exclusive_lock
from metagmvae.pipelines.records import DataError


@pytest.fixture
def no_locks(monkeypatch):
    """NFS without its lock service."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize(
    "lock",
    [
        lambda folder: lock_run_folder(folder),
        lambda folder: upload_lock(folder),
        lambda folder: exclusive_lock(folder / ".lock", "busy"),
    ],
)
def test_file_system_without_locks_is_named(lock, no_locks, tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}: cannot be .* \\(No locks available\\); choose"), lock(tmp_path):
        pass


@pytest.mark.mlflow
def test_store_on_a_file_system_without_locks_is_refused_and_not_waited_for(no_locks, tmp_path):
    with pytest.raises(DataError, match=r"cannot be locked \(No locks available\)"):
        create_store(tmp_path / "mlflow.db")


def test_second_training_in_a_folder_is_refused(tmp_path):
    with (
        lock_run_folder(tmp_path),
        pytest.raises(DataError, match="another process trains in this folder"),
        lock_run_folder(tmp_path, patience_s=0.3),
    ):
        pass
    with lock_run_folder(tmp_path):  # it was released
        pass


def test_error_inside_the_lock_is_not_one_of_the_lock(tmp_path):
    with pytest.raises(PermissionError), lock_run_folder(tmp_path):
        raise PermissionError(errno.EACCES, "no")
