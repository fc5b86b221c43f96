"""Random starting points of EM with distinct values, in operations of fixed shape.

Notation: E episodes, P points per episode (data points times Monte Carlo samples), K components, D latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""2^64 / golden ratio modulo 2^64, as int64: a factor that mixes the bits of consecutive integers."""


class MixtureError(ValueError):
    """There are fewer distinct points than components."""


def init_indices(z_EPD: Tensor, components: int, generators: list[torch.Generator]) -> Tensor:
    """Draw K random points with distinct values in each episode: the initial means of Eq. 7.

    Args:
        z_EPD: points.
        components: K.
        generators: one per episode, so that the draw does not depend on the rest of the batch.

    Returns:
        int64 indices of points, (E, K).

    Raises:
        MixtureError: an episode has fewer than K distinct points.
    """
    index_EK, enough_E = first_distinct(z_EPD, random_order(z_EPD.shape[1], generators).to(z_EPD.device), components)
    if not enough_E.all():
        raise MixtureError(too_few_points(components))
    return index_EK


def too_few_points(components: int) -> str:
    """Message of a `MixtureError`."""
    return (
        f"{components} components need as many distinct points, but an episode has fewer: lower train.components or "
        "raise train.set_size"
    )


def random_order(points: int, generators: list[torch.Generator]) -> Tensor:
    """A random permutation of the points of each episode, int64, (E, P)."""
    return torch.stack([torch.randperm(points, generator=g, device=g.device) for g in generators])


def first_distinct(z_EPD: Tensor, order_EP: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The first K points with distinct values in a given order, in operations of fixed shape.

    Components that start at equal points would stay equal for ever. The result stays on the device: reading it would
    make the host wait.

    Args:
        z_EPD: points.
        order_EP: order of the points, int64.
        components: K.

    Returns:
        int64 indices of points, (E, K), and whether an episode has K distinct points, bool, (E,).
    """
    key_EP = torch.gather(_keys(z_EPD), 1, order_EP)
    free_EP = torch.ones_like(order_EP, dtype=torch.uint8)
    enough_E = torch.ones_like(order_EP[:, 0], dtype=torch.bool)
    picked = []
    for _ in range(components):
        position_E1 = free_EP.argmax(dim=1, keepdim=True)  # the first of the largest
        enough_E = enough_E & free_EP.gather(1, position_E1)[:, 0].bool()
        picked.append(order_EP.gather(1, position_E1))
        free_EP = free_EP * (key_EP != key_EP.gather(1, position_E1))
    return torch.cat(picked, dim=1), enough_E


def _keys(z_EPD: Tensor) -> Tensor:
    """One int64 per point, (E, P): equal for equal points, different for different points (but for chance, 2^-64).

    A sum of the bits of the values with pseudo-random odd factors modulo 2^64, which is exact in any order.
    """
    bits_EPD = (z_EPD + 0.0).view(torch.int32 if z_EPD.dtype == torch.float32 else torch.int64).to(torch.int64)
    # The upper half also goes into the lower half: a change of the sign alone would cancel in an even number of terms.
    bits_EPD = bits_EPD ^ ((bits_EPD >> 32) & 0xFFFFFFFF)
    factor_D = (torch.arange(1, z_EPD.shape[2] + 1, device=z_EPD.device) * GOLDEN) ^ GOLDEN
    factor_D = (factor_D ^ (factor_D >> 29)) * GOLDEN
    return (bits_EPD * ((factor_D ^ (factor_D >> 32)) | 1)).sum(dim=2)
