"""UMTRA: tasks whose classes are single unlabelled images (Khodadadeh et al., NeurIPS 2019).

K images drawn at random are taken for K classes, since they are of different classes with high probability; augmented
views of them are the queries (section 3 of the paper). `TaskStream` without partitions draws the images.

Notation: b tasks, K ways, S = 1 labelled image and Q queries per class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metagmvae.training.augment.view import View


def augmented_queries(support_bK1: Tensor, view: View, generators: Sequence[torch.Generator], queries: int) -> Tensor:
    """Return Q random views of every labelled image, (b, K, 1, C, H, W) -> (b, K, Q, C, H, W).

    Args:
        support_bK1: images in [0, 1].
        view: the random augmentation.
        generators: one of each task, so that a task does not depend on the rest of the batch.
        queries: Q.
    """
    views = [
        torch.stack([view(images[:, 0], generator) for _ in range(queries)], dim=1)
        for images, generator in zip(support_bK1, generators, strict=True)
    ]
    return torch.stack(views)
