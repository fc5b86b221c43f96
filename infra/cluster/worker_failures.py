"""Why a Ray worker was lost, in one line: out of memory, killed, crashed, its node, or an error of Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import OutOfMemoryError

MEMORY_REMEDY = "use fewer workers per node, a smaller batch, or data.reader = mmap"
CRASHED = re.compile(r"SIG(?:SEGV|ABRT|BUS|ILL|FPE)|Segmentation fault|Fatal Python error: (?!none)\w+")
NODE_LOST = ("its node has died", "is temporarily unavailable")
"""In Ray's messages about a lost node."""
LOST = "connection error code 2"
"""In Ray's message about a process that ended without a word. Ray itself then lists what may have happened."""


def failure_reason(error: BaseException | str) -> str:
    """Why work on Ray failed, from an exception or its text: the cause of a lost process, else the last line.

    >>> failure_reason("Traceback:\\n  in step\\nValueError: batch is 0")
    'ValueError: batch is 0'
    """
    text = str(error)
    signs = ("OutOfMemoryError", "memory usage threshold", "running low on memory")
    if isinstance(error, OutOfMemoryError) or any(sign in text for sign in signs):
        return f"a worker was stopped because its node ran out of memory: {MEMORY_REMEDY}"
    if any(sign in text for sign in NODE_LOST):
        return "a node of the Ray cluster was lost"
    if LOST in text or "died unexpectedly" in text or "WorkerCrashedError" in text:
        crash = _crash(text)
        if crash:
            return f"a worker crashed ({crash}): see its log in {_logs()}"
        return f"a worker was killed (SIGKILL), most likely because its node ran out of memory: {MEMORY_REMEDY}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _crash(text: str) -> str:
    """The signal of a crash according to the logs of the lost process on this node; empty if there is none."""
    for log in _logs_of(set(re.findall(r"pid(?:=|: ?)(\d+)", text))):
        found = CRASHED.search(log.read_text(encoding="utf-8", errors="replace"))
        if found:
            return "SIGSEGV" if found[0] == "Segmentation fault" else found[0]
    return ""


def _logs_of(pids: set[str]) -> Iterator[Path]:
    for pid in pids:
        for pattern in (f"worker-*-{pid}.err", f"worker-*-{pid}.out"):
            yield from _logs().glob(pattern)


def _logs() -> Path:
    """Folder of the logs of Ray's processes on this node."""
    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node is not None else Path("/tmp/ray/session_latest/logs")
