"""Random generators keyed by integers."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A Philox generator whose numbers depend on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
