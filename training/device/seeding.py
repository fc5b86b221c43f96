"""Random numbers from generators keyed by (seed, purpose, index), and transfer to the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose random numbers are a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def episode_generators(device: torch.device, seed: int, purpose: str, episodes: Iterable[int]) -> list[torch.Generator]:
    """One keyed generator per episode, so that an episode's random numbers do not depend on the rest of the batch."""
    return [keyed_generator(device, seed, purpose, int(episode)) for episode in episodes]


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform random numbers in [-1, 1], drawn on the generator's device and moved to the device of `like`."""
    return (torch.rand(shape, generator=generator, device=generator.device) * 2 - 1).to(like.device)


def host_permutation(n: int, generator: torch.Generator) -> list[int]:
    """A random permutation of 0 to n - 1 for the host, which does not wait for the device of the generator.

    A generator of the host draws it; for another device, the host's generator is keyed by the state of that one.
    """
    if generator.device.type != "cpu":
        state = ("host", generator.initial_seed(), generator.get_offset())
        generator = keyed_generator(torch.device("cpu"), *state)
    return torch.randperm(n, generator=generator).tolist()


def to_device(images: object, device: torch.device) -> Tensor:
    """Copy an array to the device without changing its type: uint8 is a quarter of the bytes of float32."""
    return torch.as_tensor(images).to(device, non_blocking=True)
