"""NT-Xent, the contrastive loss of SimCLR (Chen et al., ICML 2020, Eq. 1 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.precision import at_least_float32

Gather = Callable[[Tensor], Tensor]
"""Stack equal-sized tensors of all ranks along dimension 0, with gradient; identity in one process."""


def nt_xent(first: Tensor, second: Tensor, temperature: float, gather: Gather = lambda t: t, rank: int = 0) -> Tensor:
    """Mean over the local 2n views of -log softmax of the positive among all other views of all ranks.

    The mean over ranks of this value is NT-Xent of the whole batch; with the gradient averaged over ranks
    (DDP), and `gather` passing gradients back to every rank, the gradient is that of the whole batch too.

    Args:
        first, second: features of two views of the same images, (n, F); normalised here.
        temperature: tau.
        gather: brings the views of other ranks in as negatives.
        rank: position of the local views in what `gather` returns.
    """
    count = first.shape[0]
    first = F.normalize(at_least_float32(first), dim=1)
    second = F.normalize(at_least_float32(second), dim=1)
    all_first, all_second = gather(first), gather(second)
    everything = torch.cat([all_first, all_second])
    total = all_first.shape[0]
    logits = torch.cat([first, second]) @ everything.T / temperature
    own = torch.arange(count, device=logits.device) + rank * count
    self_column = torch.cat([own, own + total])
    positive_column = torch.cat([own + total, own])
    logits = logits.scatter(1, self_column[:, None], float("-inf"))
    return F.cross_entropy(logits, positive_column)
