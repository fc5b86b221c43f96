"""Time for benchmarks: of the clock, and of the processors."""

from __future__ import annotations

import resource
import time

import numpy as np


def times() -> np.ndarray:
    """Seconds of the clock, and of processor time of this process and of its child processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime])
