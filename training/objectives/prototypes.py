"""The loss of ProtoCLR: views of an image are classified by the nearest image (Medina et al., 2020, Algorithm 1).

Medina, Devos and Grossglauser, "Self-Supervised Prototypical Transfer Learning for Few-Shot Classification".

Notation: n images per rank, W ranks, Q views per image, F feature size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.objectives.nt_xent import Gather


def prototype_loss(
    prototypes: Tensor, queries: Tensor, temperature: float, gather: Gather = lambda t: t, rank: int = 0
) -> Tensor:
    """Mean over this rank's views of -log softmax of their image among all images of all ranks.

    The logits are negative mean squared differences of features, divided by the temperature, so that one temperature
    suits any feature size. (ProtoCLR has the sum: a temperature of 1 / F. Its published code squares the distances; the
    paper says "Euclidean".) The mean over ranks and its gradient are those of the whole batch, as in `nt_xent`.

    Args:
        prototypes: features of the images without augmentation, (n, F).
        queries: features of their views, (Q * n, F): all images in the first view, then in the second, and so on.
        temperature: 1 / F in the paper.
        gather: collects the prototypes of all ranks; the identity in one process.
        rank: position of this rank's images in the result of `gather`.
    """
    n = prototypes.shape[0]
    prototypes, queries = gather(at_least_float32(prototypes)), at_least_float32(queries)
    # The squared length of the query is the same for all prototypes, so it cancels.
    logits = (2 * queries @ prototypes.T - prototypes.square().sum(dim=1)) / (temperature * queries.shape[1])
    own = torch.arange(n, device=queries.device) + rank * n
    return F.cross_entropy(logits, own.repeat(queries.shape[0] // n))
