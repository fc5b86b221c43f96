"""The training loop, used by every stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from metagmvae.training.device import distributed
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState


class NonFiniteLossError(ValueError):
    """The loss or a gradient is not finite. The update was not applied, and the last checkpoint stays."""


@dataclass(frozen=True)
class Stage:
    """A module to train for a fixed number of steps, with its optimiser and data."""

    name: str
    steps: int
    module: nn.Module
    """A step module: batch -> (loss, terms), already wrapped for data parallelism (`training.trainer.steps`)."""
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    stream: Iterator[Any]
    """Batches from the first step on; a tuple is unpacked to several arguments. May have `waiting_s` and `close()`."""
    images_per_step: int
    """Over all ranks, for the reported throughput."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping."""


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls between steps, on all ranks, and how often."""

    state: Callable[[int], TrainState]
    """Returns the checkpoint after a step."""
    after_step: Callable[[int], MetricLine]
    """Returns more metrics for the line of a step, such as validation results."""
    log_every: int
    checkpoint_every: int
    validate_every: int = 0
    """Steps between validations, each of which has a metric line; 0: none."""

    def line_due(self, step: int) -> bool:
        """Whether a metric line is due after this step."""
        return any(every and step % every == 0 for every in (self.log_every, self.validate_every))


def fit_stage(stage: Stage, hooks: Hooks, context: RunContext, *, start: int, elapsed: float) -> float:
    """Train from step `start` to the end of the stage.

    A checkpoint is due every `checkpoint_every` steps and after the last one. Each metric line averages over the steps
    since the line before, and each checkpoint has a line, so a resumed run writes the same lines.

    Args:
        stage: what is trained.
        hooks: called between steps.
        context: records metric lines and checkpoints.
        start: steps done so far.
        elapsed: seconds trained so far.

    Returns:
        Seconds trained, `elapsed` included.

    Raises:
        NonFiniteLossError: before the update, on all ranks in the same step (after averaging over ranks, a gradient
            that is not finite on one rank is not finite on any).
    """
    window = _Window(stage, elapsed)
    stage.module.train()
    try:
        for step in range(start + 1, stage.steps + 1):
            batch = next(stage.stream)
            loss, terms = stage.module(*batch) if isinstance(batch, tuple) else stage.module(batch)
            norm = _update(stage, loss, step)
            window.add(loss, terms, norm)
            checkpoint_due = step % hooks.checkpoint_every == 0 or step == stage.steps
            if hooks.line_due(step) or checkpoint_due:
                line = window.line(step) | hooks.after_step(step) | {"checkpoint": int(checkpoint_due)}
                save = checkpoint_due and context.rank == 0
                window.update_elapsed()
                context.report(line, hooks.state(step) | {"elapsed": window.elapsed} if save else None)
                window.reset()
                stage.module.train()
    finally:
        close = getattr(stage.stream, "close", None)
        if close is not None:
            close()
    return window.elapsed


def _update(stage: Stage, loss: Tensor, step: int) -> Tensor:
    """One optimiser step; returns the gradient norm before clipping."""
    stage.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, stage.clip_norm or float("inf"))
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise NonFiniteLossError(
            f"{stage.name} step {step}: loss {loss.item():g}, gradient norm {norm.item():g}; the update was not "
            "applied and the last checkpoint stays: lower the learning rate, or set train.clip_norm"
        )
    stage.optimizer.step()
    stage.schedule.step()
    return norm


class _Window:
    """Means and rates over the steps since the last metric line."""

    def __init__(self, stage: Stage, elapsed: float) -> None:
        self.stage = stage
        self.elapsed = elapsed
        self.updated_at = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.update_elapsed()
        self.waited_before = getattr(self.stage.stream, "waiting_s", 0.0)
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def update_elapsed(self) -> None:
        """Add the time since the last call. Elapsed time includes saving and validation; throughput does not."""
        now = time.perf_counter()
        self.elapsed += now - self.updated_at
        self.updated_at = now

    def add(self, loss: Tensor, terms: dict[str, Tensor], norm: Tensor) -> None:
        self.steps += 1
        for name, value in {"loss": loss.detach(), **terms, "gradient_norm": norm.detach()}.items():
            self.sums[name] = self.sums[name] + value.float() if name in self.sums else value.float()

    def line(self, step: int) -> MetricLine:
        """The metric line: means over steps and ranks (of times too), so that all ranks have the same line."""
        waited = getattr(self.stage.stream, "waiting_s", 0.0) - self.waited_before
        seconds = max(time.perf_counter() - self.updated_at, 1e-9)
        names = list(self.sums)
        sums = torch.stack([self.sums[name] for name in names]).double() / self.steps
        times = torch.tensor([seconds, waited, self.elapsed + seconds], dtype=torch.float64, device=sums.device)
        *means, seconds, waited, elapsed = distributed.mean_over_ranks(torch.cat([sums, times])).tolist()
        return {
            "stage": self.stage.name,
            "step": step,
            "steps": self.stage.steps,
            **dict(zip(names, means, strict=True)),
            "learning_rate": self.stage.optimizer.param_groups[0]["lr"],
            "images_per_s": self.steps * self.stage.images_per_step / seconds,
            "waiting_share": min(waited / seconds, 1.0),
            "elapsed_s": elapsed,
        }
