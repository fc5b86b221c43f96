"""Contrastive pre-training: NT-Xent of SimCLR (Chen et al., 2020) and the prototypes of ProtoCLR (Medina et al., 2020).

Notation: n images of this rank, v views of each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metagmvae.configs.schema import Settings
from metagmvae.training.device import distributed
from metagmvae.training.models.encoders import EncoderModel, build_projector
from metagmvae.training.objectives.nt_xent import nt_xent
from metagmvae.training.objectives.prototypes import prototype_loss
from metagmvae.training.pretraining.step import PretrainMetrics, ViewStep


class ContrastiveStep(ViewStep):
    """Contrastive pre-training on views of the images of this rank, with negatives from all ranks.

    `nt-xent`: two views of each image (SimCLR). `prototypes`: the image itself and Q views of it (ProtoCLR). The
    auxiliary module is the projection head between features and loss.

    Batch normalisation sees this rank's views only, as in SimCLR without "global BN". Otherwise loss and gradient equal
    those of one process. The views are keyed by (seed, step, rank), so they change with the number of ranks.
    """

    @classmethod
    def build_auxiliary(cls, model: EncoderModel, settings: Settings, images: int) -> nn.Module:
        """The projection head of the settings; the identity for none."""
        return build_projector(model.feature_dim, settings.pretrain.projector)

    def prepare(self, images: object, step: int) -> tuple[Tensor, ...]:
        """All that is encoded, (v * n, C, H, W): two views of each image, or the images and Q views of each."""
        x = self._images(images)
        generator = self._generator("views", step)
        prototypes = self.pretrain.objective == "prototypes"
        views = [self.view(x, generator) for _ in range(self.pretrain.query_views if prototypes else 2)]
        if prototypes:
            views.insert(0, self._resized(x, views[0].shape[-2:]))
        return (self._in_format(torch.cat(views)),)

    def compute(self, inputs: Tensor) -> tuple[Tensor, PretrainMetrics]:
        """Loss from the result of `prepare`, and no further metrics."""
        with self._autocast(inputs.device):
            h = self.auxiliary(self.encoder(inputs))
        ranks = (self.pretrain.temperature, distributed.all_gather, distributed.rank())
        if self.pretrain.objective == "prototypes":
            n = len(h) // (1 + self.pretrain.query_views)
            return prototype_loss(h[:n], h[n:], *ranks), {}
        first, second = h.chunk(2)
        return nt_xent(first, second, *ranks), {}
