"""What training needs of its surroundings: one small interface, with a local and a Ray adapter in `infra`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from metagmvae.training.models.encoders import EncoderModel

MetricLine = dict[str, float | int | str]
"""One metric line: plain numbers and strings only."""

TrainState = dict[str, Any]
"""A checkpoint's content: tensors and plain values, loadable with `weights_only`."""

Validate = Callable[[EncoderModel], Mapping[str, Mapping[str, float]]]
"""Judge the model on validation episodes: {"5w1s": {"accuracy": ..., "ci95": ...}}; called on rank 0 only."""


class RunContext(Protocol):
    """Rank, device and memory of a training run; `training` knows nothing else about where it runs."""

    rank: int
    world: int
    device: torch.device

    def load(self) -> TrainState | None:
        """Return the newest checkpoint of this run, or None at its start."""

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        """Take a metric line, and the state where a checkpoint is due.

        Called on all ranks equally often, at every `log_every` steps, after every validation and at every
        checkpoint; `line` holds means over ranks (validation on rank 0 only), `state` is given on rank 0 only
        (None elsewhere and between checkpoints). Key `checkpoint` of the line is 1 on all ranks when a
        checkpoint is due.
        """
