"""Why a Ray worker was lost, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, WorkerCrashedError

from metagmvae.infra.cluster import worker_failures
from metagmvae.infra.cluster.worker_failures import failure_reason

LOST = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 4711\n"
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: "
    "(1) the process was killed by the OOM killer, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "its node ran out of memory"),
        (
            RuntimeError("\n  ray.exceptions.OutOfMemoryError: killed\nSet RAY_x"),
            "its node ran out of memory",
        ),
        (RuntimeError("2 worker(s) were killed due to the node running low on memory"), "its node ran out of memory"),
        (RuntimeError(LOST), "killed (SIGKILL), most likely because its node ran out of memory"),
        (WorkerCrashedError(), "killed (SIGKILL)"),
        (
            RuntimeError(f"{LOST}\nThe actor died because its node has died. Node Id: ab\n\tthe actor's node was lost"),
            "a node of the Ray cluster was lost",
        ),
        (
            ActorUnavailableError("The actor is temporarily unavailable: RpcError: Socket closed rpc_code: 14", None),
            "a node of the Ray cluster was lost",
        ),
        (RuntimeError("Traceback\n  in step\nValueError: batch is 0\n\n"), "ValueError: batch is 0"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_reason_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, reason: str) -> None:
    monkeypatch.setattr(worker_failures, "_logs", lambda: tmp_path)
    assert reason in failure_reason(error)
    assert "\n" not in failure_reason(error)


@pytest.mark.parametrize(
    ("log", "signal"),
    [
        ("*** SIGSEGV received at time=1 on cpu 0 ***", "SIGSEGV"),
        ("Fatal Python error: Segmentation fault\n", "Fatal Python error: Segmentation"),
        ("*** SIGABRT received at time=1 ***", "SIGABRT"),
    ],
)
def test_a_crash_is_recognised_by_the_log_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: str, signal: str
) -> None:
    monkeypatch.setattr(worker_failures, "_logs", lambda: tmp_path)
    (tmp_path / "worker-ab-01000000-4711.err").write_text(log)
    (tmp_path / "worker-cd-01000000-4712.err").write_text("*** SIGBUS received ***")
    assert failure_reason(RuntimeError(LOST)) == f"a worker crashed ({signal}): see its log in {tmp_path}"
