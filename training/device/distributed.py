"""Data parallelism: the only user of torch.distributed. Answers for one process where no group exists.

An episode is atomic: sets are never split over ranks, so neither EM nor the objective holds a collective, and
DDP's mean over equal-sized batches is exact. Batch normalisation is the one exception: in training mode it
couples the images of a rank, so W ranks normalise by W smaller batches instead of one and are not equal to
one process (with frozen statistics they are, to rounding: tested). Its running statistics are rank 0's,
which DDP broadcasts before each forward pass, and `share_buffers` before the first of a stage.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def active() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if active() else 1


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP around a module with a group, the module itself without one."""
    if not active() or world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index or 0] if device.type == "cuda" else None)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a tensor over ranks; a copy, without gradient."""
    values = values.detach().clone()
    if active() and world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0: after a stage each rank still holds what it saw last itself."""
    if active() and world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until every rank is here (rank 0 validates while the others wait)."""
    if active() and world_size() > 1:
        dist.barrier()


class _GatherWithGradient(torch.autograd.Function):
    """all_gather forward; backward sums what every rank's loss sends to this rank's rows."""

    @staticmethod
    def forward(ctx: object, local: Tensor) -> Tensor:
        pieces = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(pieces, local.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(local: Tensor) -> Tensor:
    """Stack equal-sized tensors of all ranks along dimension 0, with gradient."""
    return _GatherWithGradient.apply(local) if active() and world_size() > 1 else local
