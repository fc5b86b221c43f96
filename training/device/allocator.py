"""Memory allocator settings: keep the memory that one training step frees for the next step.

By default glibc returns freed blocks above 32 MiB to the system, so each feature map is made of new pages, which the
kernel fills with zeros one page fault at a time: up to 40% of the time of a step on a CPU (`metagmvae bench step`).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Options of mallopt(3)."""
NEVER = -1
PAD = 256 * 2**20
"""Bytes by which the heap grows at a time."""


@lru_cache
def keep_freed_memory() -> bool:
    """Make this process keep freed memory from now on; False where the C library has no such option (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, NEVER), mallopt(TOP_PAD, PAD)])


def give_back_freed_memory() -> None:
    """Return the freed memory of this process to the system once, also after `keep_freed_memory`; glibc only."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
