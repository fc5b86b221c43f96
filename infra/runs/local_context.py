"""The run context of the local engine: one process that writes into a run folder. Needs neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from metagmvae.infra.runs.run_folder import (
    CHECKPOINT,
    METRICS,
    append_lines,
    drop_lines_after,
    global_step,
    not_written,
)
from metagmvae.infra.runs.stop_signals import deferred_signals
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, TrainState


class LocalContext:
    """Rank 0 of 1. Replaces the checkpoint atomically and appends each metric line to its file."""

    rank = 0
    world = 1

    def __init__(self, run_dir: Path, device: torch.device, *, resume: bool) -> None:
        self.run_dir = run_dir
        self.device = device
        self.resume = resume

    def load(self) -> TrainState | None:
        """Return the checkpoint to resume from, or None; delete the metric lines of the steps after it."""
        path = self.run_dir / CHECKPOINT
        if not (self.resume and path.exists()):
            drop_lines_after(self.run_dir / METRICS, 0)
            return None
        state = load_state(path)
        drop_lines_after(self.run_dir / METRICS, global_step(state))
        return state

    def stop_requests(self) -> AbstractContextManager[Callable[[], bool]]:
        """Ctrl-C and SIGTERM stop the training at the end of a step."""
        return deferred_signals()

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        """Save the checkpoint, if there is one, and append the metric line.

        Raises:
            WorkError: the disk is full, or a file cannot be written.
        """
        # In this order, so that after a kill no line belongs to a step that the resumed run repeats.
        if state is not None:
            try:
                save_state(self.run_dir / CHECKPOINT, state)
            except OSError as error:
                raise not_written(self.run_dir / CHECKPOINT, error) from error
        if line is not None:
            append_lines(self.run_dir / METRICS, [line])
