"""Data parallelism: the only module that uses torch.distributed. Without a process group it answers for one process.

Episodes are never split over ranks, so neither EM nor the objective needs communication, and DDP's mean over ranks
with equally many episodes is exact. Batch normalisation is the exception: in training mode W ranks normalise over W
smaller batches, so W ranks do not equal one process (with fixed statistics they do, to rounding: tested). The running
statistics are those of rank 0: DDP broadcasts them before each forward pass, `broadcast_buffers` before each stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module in DDP; one process gets the module unchanged."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index or 0] if device.type == "cuda" else None)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over ranks: a copy, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to every rank: after a stage each rank holds the statistics of its own last batch."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def from_rank(values: np.ndarray, source: int) -> np.ndarray:
    """The array of one rank, on every rank; all ranks give one of the same shape and type."""
    if world_size() == 1:
        return values
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.as_tensor(values).to(device)
    dist.broadcast(tensor, src=source)
    return tensor.cpu().numpy()


def barrier() -> None:
    """Wait for all ranks (rank 0 validates while the others wait)."""
    if world_size() > 1:
        dist.barrier()


class StopVote:
    """Whether any rank requests a stop; all ranks get the same answer at the same step.

    Several ranks communicate about once a second, not at each step.

    Args:
        requested: whether this rank requests a stop.
        device: of tensors that the ranks exchange.
        start: steps done so far.
    """

    def __init__(self, requested: Callable[[], bool], device: torch.device, start: int) -> None:
        self.requested, self.device = requested, device
        self.asked_at, self.asked_step, self.next_step = time.perf_counter(), start, start

    def __call__(self, step: int) -> bool:
        if world_size() == 1:
            return self.requested()
        if step < self.next_step:
            return False
        now = time.perf_counter()
        seconds = (now - self.asked_at) / max(1, step - self.asked_step)
        answers = torch.tensor([float(self.requested()), seconds], dtype=torch.float64, device=self.device)
        requests, seconds = mean_over_ranks(answers).tolist()
        self.asked_at, self.asked_step = now, step
        self.next_step = step + max(1, int(1.0 / max(seconds, 1e-6)))
        return requests > 0


class _AllGather(torch.autograd.Function):
    """all_gather; the backward pass sums the gradients that all ranks have with respect to this rank's rows.

    torch 2.14 deprecates its own (`torch.distributed.nn.functional.all_gather`, a FutureWarning at each call) in favour
    of a private module with other names in older versions.
    """

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


def all_gather(local: Tensor) -> Tensor:
    """Concatenate equally sized tensors of all ranks along dimension 0, differentiably: (n, ...) -> (W * n, ...)."""
    return _AllGather.apply(local) if world_size() > 1 else local
