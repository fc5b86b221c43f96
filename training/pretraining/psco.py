"""PsCo: contrast with pseudo-labelled tasks from a queue of momentum features (Jang, Lee and Shin, ICLR 2023).

"Unsupervised Meta-learning via Few-shot Pseudo-supervised Contrastive Learning", arXiv 2303.00996, Section 3.

Notation: n images of this rank, N images of all ranks, Q entries of the queue, S shots, D size of the projection.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metagmvae.configs.schema import Settings
from metagmvae.training.device import distributed
from metagmvae.training.device.precision import at_least_float32
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.pretraining.step import PretrainMetrics, ViewStep

SINKHORN_ITERATIONS = 3
SINKHORN_TEMPERATURE = 0.05
SHOT_TEMPERATURE = 1.0
"""Temperature of the pseudo-supervised loss. All three are those of the published code."""


class PscoModules(nn.Module):
    """Projector and predictor, the momentum copies of encoder and projector, and the queue."""

    queue: Tensor
    """Momentum features of earlier batches, unit length, (Q, D)."""
    position: Tensor
    """Row of the queue that is replaced next."""

    def __init__(self, encoder: nn.Module, feature_dim: int, sizes: tuple[int, ...], queue: int) -> None:
        super().__init__()
        *hidden, out = sizes
        self.projector = mlp([feature_dim, *hidden, out])
        self.projector.append(nn.BatchNorm1d(out, affine=False))
        self.predictor = mlp([out, *hidden, out])
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, out)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest entries of the queue by these, (N, D)."""
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, keys.to(self.queue.dtype))
        self.position.add_(len(keys)).remainder_(len(self.queue))


class PscoStep(ViewStep):
    """MoCo's loss, and a supervised contrastive loss on tasks whose labels are found by optimal transport.

    One view of each image is a query, encoded by the trained networks; the other is a key, encoded by the momentum
    networks. The queries of the batch are the classes of a task; the shots of each are the S entries of the queue to
    which Sinkhorn's assignment of the keys gives the largest weights. As in the published code, the momentum networks
    are updated first, their buffers are those of the trained networks, and the new keys enter the queue last. Batch
    normalisation sees this rank only (the published code synchronises it), and both views have the same augmentation.
    """

    auxiliary: PscoModules

    @classmethod
    def build_auxiliary(cls, model: EncoderModel, settings: Settings, images: int) -> nn.Module:
        """All that PsCo has beside the encoder; the momentum copies start equal to their originals."""
        pretrain = settings.pretrain
        return PscoModules(model.encoder, model.feature_dim, pretrain.projector, pretrain.queue)

    def prepare(self, images: object, step: int) -> tuple[Tensor, ...]:
        """Two views of each image, (n, C, H, W) each."""
        x, generator = self._images(images), self._generator("views", step)
        return tuple(self._in_format(self.view(x, generator)) for _ in range(2))

    def compute(self, query_view: Tensor, key_view: Tensor) -> tuple[Tensor, PretrainMetrics]:
        """The sum of the two losses, from the results of `prepare`; updates momentum networks and queue."""
        modules, pretrain = self.auxiliary, self.pretrain
        update_momentum(modules.momentum_encoder, self.encoder, pretrain.momentum)
        update_momentum(modules.momentum_projector, modules.projector, pretrain.momentum)
        with self._autocast(query_view.device):
            query = modules.predictor(modules.projector(self.encoder(query_view)))
            with torch.no_grad():
                key = modules.momentum_projector(modules.momentum_encoder(key_view))
        query, key = (F.normalize(at_least_float32(h)) for h in (query, key))
        keys = distributed.all_gather(key)
        queue = modules.queue.clone()  # the gradient needs the queue as it was
        first = distributed.rank() * len(key)
        moco = moco_loss(query, key, queue, pretrain.temperature)
        supervised = pseudo_supervised_loss(query, queue[pseudo_shots(keys @ queue.T, pretrain.shots)], first)
        modules.enqueue(keys)
        return moco + supervised, {"moco_loss": moco.detach(), "supervised_loss": supervised.detach()}


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers without bias, with batch normalisation and ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


@torch.no_grad()
def update_momentum(copied: nn.Module, original: nn.Module, momentum: float) -> None:
    """Move the weights of the copy towards those of the original by 1 - momentum; copy its buffers."""
    for ours, theirs in zip(copied.parameters(), original.parameters(), strict=True):
        ours.lerp_(theirs, 1 - momentum)
    for buffer, source in zip(copied.buffers(), original.buffers(), strict=True):
        buffer.copy_(source)


def sinkhorn(similarity_NQ: Tensor, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Assignment of N keys to Q entries: entries have nearly equal sums N / Q, and each row has the sum 1.

    Alternating normalisation of columns and rows of exp(similarity / 0.05) (Cuturi, 2013), in logarithms. The rows come
    last, so their sums are exact; those of the columns converge with the iterations.
    """
    log_NQ = similarity_NQ / SINKHORN_TEMPERATURE
    for _ in range(iterations):
        log_NQ = log_NQ - log_NQ.logsumexp(dim=0, keepdim=True)
        log_NQ = log_NQ - log_NQ.logsumexp(dim=1, keepdim=True)
    return log_NQ.exp()


def pseudo_shots(similarity_NQ: Tensor, shots: int) -> Tensor:
    """Entries of the queue with the largest weights in Sinkhorn's assignment, int64 (N, S)."""
    return sinkhorn(similarity_NQ).topk(shots, dim=1).indices


def moco_loss(query_nD: Tensor, key_nD: Tensor, queue_QD: Tensor, temperature: float) -> Tensor:
    """Mean of -log softmax of the query's key among it and the queue (He et al., 2020)."""
    positive_n1 = (query_nD * key_nD).sum(dim=1, keepdim=True)
    logits = torch.cat([positive_n1, query_nD @ queue_QD.T], dim=1) / temperature
    return -logits.log_softmax(dim=1)[:, 0].mean()


def pseudo_supervised_loss(query_nD: Tensor, shot_NSD: Tensor, first: int) -> Tensor:
    """Mean over queries and their S shots of -log softmax of the shot among the shots of all queries.

    Args:
        query_nD: queries of this rank.
        shot_NSD: shots of the queries of all ranks.
        first: position of this rank's first query among all.
    """
    logits_nNS = torch.einsum("nd,msd->nms", query_nD, shot_NSD) / SHOT_TEMPERATURE
    own = torch.arange(len(query_nD), device=query_nD.device)
    log_probability = logits_nNS.flatten(1).log_softmax(dim=1).unflatten(1, shot_NSD.shape[:2])
    return -log_probability[own, first + own].mean()
