"""Memory of this process and of Ray's workers, in bytes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import psutil


def current_rss() -> int:
    """Resident set size of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Largest resident set size of this process so far; psutil does not report it on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ray_worker_rss(task: str = "", *, descendants: bool = False) -> int:
    """Sum of the resident set sizes of Ray's worker processes; pages that they share count once per worker.

    Args:
        task: count only workers whose task or actor has a name that starts with this.
        descendants: count only workers that descend from this process.
    """
    processes: Iterable[psutil.Process] = (
        psutil.Process().children(recursive=True) if descendants else psutil.process_iter()
    )
    total = 0
    for process in processes:
        try:
            # Ray sets the title of a worker to `ray::NAME`.
            if "".join(process.cmdline()[:1]).startswith(f"ray::{task}"):
                total += process.memory_info().rss
        except psutil.Error:
            continue  # the process has ended, or belongs to another user
    return total
