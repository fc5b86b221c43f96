"""Processes for tests of data parallelism, forked from a server process that imports torch and the package once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def process_context() -> Any:
    """Context whose processes start in milliseconds and have no threads of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch.multiprocessing", "metagmvae.training.trainer.stages"])
    return context


def run_on_two_ranks(worker: Callable[[int, str], None], folder: Path) -> list[dict[str, Any]]:
    """Run `worker(rank, folder)` in two processes; return what they saved as `rank0.pt` and `rank1.pt`."""
    process_context()
    torch.multiprocessing.start_processes(worker, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
