"""NT-Xent, the contrastive loss of SimCLR (Chen et al., ICML 2020, Eq. 1 and Algorithm 1).

Notation: n images per rank, W ranks, F feature size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.precision import at_least_float32

Gather = Callable[[Tensor], Tensor]
"""Concatenates equally sized tensors of all ranks along dimension 0, differentiably: (n, F) -> (W * n, F)."""


def nt_xent(first: Tensor, second: Tensor, temperature: float, gather: Gather = lambda t: t, rank: int = 0) -> Tensor:
    """Mean over this rank's 2n views of -log softmax of the positive among all other views of all ranks.

    The mean of this value over ranks is NT-Xent of the whole batch. Because `gather` is differentiable and DDP averages
    gradients over ranks, the gradient is that of the whole batch too.

    Args:
        first, second: features of two views of the same images, (n, F) each; normalised here.
        temperature: tau.
        gather: collects the views of all ranks; the identity in one process.
        rank: position of this rank's views in the result of `gather`.
    """
    count = first.shape[0]
    first = F.normalize(at_least_float32(first), dim=1)
    second = F.normalize(at_least_float32(second), dim=1)
    all_first, all_second = gather(first), gather(second)
    all_views = torch.cat([all_first, all_second])
    total = all_first.shape[0]
    logits = torch.cat([first, second]) @ all_views.T / temperature
    own = torch.arange(count, device=logits.device) + rank * count
    self_column = torch.cat([own, own + total])
    positive_column = torch.cat([own + total, own])
    logits = logits.scatter(1, self_column[:, None], float("-inf"))
    return F.cross_entropy(logits, positive_column)
