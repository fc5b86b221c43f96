"""The C library's allocator: keep the memory that every step frees, for the next step takes the same again.

glibc hands blocks above 32 MiB back to the system as soon as they are free, so each map of a network is made of new
pages, which the kernel fills with zeros one fault at a time: up to 40% of a step's time on a processor (`bench step`).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Options of mallopt(3)."""
NEVER = -1
PAD = 256 * 2**20
"""Bytes that the heap grows by at once."""


@lru_cache
def keep_freed_memory() -> bool:
    """From now on this process keeps freed memory for itself; whether its C library can be told so (glibc can)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, NEVER), mallopt(TOP_PAD, PAD)])
