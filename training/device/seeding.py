"""Random numbers keyed by (seed, step), and transfer to the device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1], drawn on the generator's device."""
    return (torch.rand(shape, generator=generator, device=generator.device) * 2 - 1).to(like.device)


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose stream is a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def to_device(images: object, device: torch.device) -> Tensor:
    """An array to the device as it is: uint8 images are a quarter of the traffic of floats."""
    return torch.as_tensor(images).to(device, non_blocking=True)
