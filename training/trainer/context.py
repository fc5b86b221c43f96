"""The interface between training and the engine that runs it (in one process, or on Ray)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from metagmvae.training.models.encoders import EncoderModel

MetricLine = dict[str, float | int | str]
"""The metrics of one step: plain numbers and strings."""

TrainState = dict[str, Any]
"""Content of a checkpoint: tensors and plain values, loadable with `weights_only`."""

Validate = Callable[[EncoderModel], Mapping[str, Mapping[str, float]]]
"""Evaluates the model on validation episodes, {"5w1s": {"accuracy": ..., "ci95": ...}}; called on rank 0 only."""


class RunContext(Protocol):
    """Rank, device, checkpoints and metrics of a run: all that `training` knows about where it runs."""

    rank: int
    world: int
    """Number of ranks."""
    device: torch.device

    def load(self) -> TrainState | None:
        """Return the newest checkpoint of this run; None if there is none."""

    def stop_requests(self) -> AbstractContextManager[Callable[[], bool]]:
        """A block in which the training stops at the end of a step when the yielded function returns True.

        Signals are deferred inside the block. With one rank it raises KeyboardInterrupt at its end if a stop was
        requested. Here: a stop is never requested.
        """
        return nullcontext(lambda: False)

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        """Record a metric line, and save a checkpoint where `state` is given.

        Called equally often on all ranks: every `log_every` steps, after each validation and at each checkpoint, and
        with `line` None for the checkpoint at which a training stops. The numbers of `line` are means over ranks,
        except validation results, which are on rank 0 only. Key `checkpoint` is 1 on all ranks when a checkpoint is
        due; `state` is then given on rank 0, and None otherwise.
        """
