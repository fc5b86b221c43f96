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
from metagmvae.training.trainer.update import Update, build_update


@dataclass(frozen=True)
class Stage:
    """A module to train for a fixed number of steps, with its optimiser and data."""

    name: str
    steps: int
    module: nn.Module
    """A step module: batch -> (loss, terms), already wrapped for data parallelism (`training.methods.meta_step`)."""
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    stream: Iterator[Any]
    """Batches from the first step on; a tuple is unpacked to several arguments. May have `waiting_s` and `close()`."""
    images_per_step: int
    """Over all ranks, for the reported throughput."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    start_step: Callable[[int], None] | None = None
    """Called before each step, on all ranks, with its number, counted from 1."""


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


def fit_stage(
    stage: Stage,
    hooks: Hooks,
    context: RunContext,
    *,
    start: int,
    elapsed: float,
    window: dict[str, Any] | None = None,
) -> float:
    """Train from step `start` to the end of the stage.

    A checkpoint is due every `checkpoint_every` steps and after the last one. Each metric line averages over the steps
    since the line before, and each checkpoint has a line, so a resumed run writes the same lines. When the context
    requests a stop, one more checkpoint is saved after the current step. It has no line; instead it contains the sums
    of the next line.

    Args:
        stage: what is trained.
        hooks: called between steps.
        context: records metric lines and checkpoints.
        start: steps done so far.
        elapsed: seconds trained so far.
        window: sums of the next metric line, from a checkpoint at which the training was stopped.

    Returns:
        Seconds trained, `elapsed` included.

    Raises:
        NonFiniteLossError: the update of a step was not applied, on all ranks (after averaging over ranks, a gradient
            that is not finite on one rank is not finite on any). On a GPU it is raised when the next line is due.
        KeyboardInterrupt: a stop was requested; the checkpoint of the last step is saved.
    """
    if not stage.steps:
        return _report_untrained(stage, hooks, context, elapsed)
    update = build_update(stage.name, stage.module, stage.optimizer, stage.clip_norm, context.device)
    sums = _Window(stage, update, elapsed, window)
    stage.module.train()
    try:
        with context.stop_requests() as requested:
            stop = distributed.StopVote(requested, context.device, start)
            if sums.steps:  # stopped before the metric line of the last step was due
                _record(stage, hooks, context, sums, start)
            for step in range(start + 1, stage.steps + 1):
                if stage.start_step is not None:
                    stage.start_step(step)
                sums.add(update(next(stage.stream), step))
                stage.schedule.step()
                if step < stage.steps and stop(step):
                    _save_stopped(hooks, context, sums, step)
                    raise KeyboardInterrupt
                _record(stage, hooks, context, sums, step)
    finally:
        close = getattr(stage.stream, "close", None)
        if close is not None:
            close()
    return sums.elapsed


def _record(stage: Stage, hooks: Hooks, context: RunContext, window: _Window, step: int) -> None:
    """Report the metric line and the checkpoint of a step, where they are due."""
    checkpoint_due = step % hooks.checkpoint_every == 0 or step == stage.steps
    if not (hooks.line_due(step) or checkpoint_due):
        return
    line = window.line(step) | hooks.after_step(step) | {"checkpoint": int(checkpoint_due)}
    save = checkpoint_due and context.rank == 0
    window.update_elapsed()
    context.report(line, hooks.state(step) | {"elapsed": window.elapsed} if save else None)
    window.reset()
    stage.module.train()


def _report_untrained(stage: Stage, hooks: Hooks, context: RunContext, elapsed: float) -> float:
    """Report the validation and the checkpoint of a stage without steps; return the seconds trained."""
    begin = time.perf_counter()
    line: MetricLine = {"stage": stage.name, "step": 0, "steps": 0, "checkpoint": 1, **hooks.after_step(0)}
    elapsed += time.perf_counter() - begin
    state = hooks.state(0) | {"elapsed": elapsed} if context.rank == 0 else None
    context.report(line | {"elapsed_s": elapsed}, state)
    return elapsed


def _save_stopped(hooks: Hooks, context: RunContext, window: _Window, step: int) -> None:
    """Save a checkpoint after a step without a metric line; validation and line of the step follow after the resume."""
    sums = window.state()
    save = context.rank == 0
    context.report(None, hooks.state(step) | {"elapsed": window.elapsed, "window": sums} if save else None)


class _Window:
    """Means and rates over the steps since the last metric line."""

    def __init__(self, stage: Stage, update: Update, elapsed: float, saved: dict[str, Any] | None) -> None:
        self.stage = stage
        self.update = update
        self.elapsed = elapsed
        self.updated_at = time.perf_counter()
        self.sums: Tensor | float
        self.reset()
        if saved is not None:
            self.steps, self.earlier_s = saved["steps"], saved["seconds"]
            update.metrics = list(saved["sums"])
            self.sums = torch.stack(list(saved["sums"].values())).to(next(stage.module.parameters()).device)

    def reset(self) -> None:
        self.update_elapsed()
        self.waited_before = getattr(self.stage.stream, "waiting_s", 0.0)
        self.earlier_s = 0.0
        """Seconds of the steps of this window before the training was stopped."""
        self.steps = 0
        self.sums = 0.0

    def state(self) -> dict[str, Any]:
        """Sums so far (their mean over ranks), number of steps and seconds, for a checkpoint within the window."""
        self.update.check()
        before = self.elapsed
        self.update_elapsed()
        assert isinstance(self.sums, Tensor)
        return {
            "steps": self.steps,
            "seconds": self.earlier_s + self.elapsed - before,
            "sums": dict(zip(self.update.metrics, distributed.mean_over_ranks(self.sums), strict=True)),
        }

    def update_elapsed(self) -> None:
        """Add the time since the last call. Elapsed time includes saving and validation; throughput does not."""
        now = time.perf_counter()
        self.elapsed += now - self.updated_at
        self.updated_at = now

    def add(self, values: Tensor) -> None:
        """Add the values of a step, (metrics,)."""
        self.steps += 1
        self.sums = self.sums + values

    def line(self, step: int) -> MetricLine:
        """The metric line: means over steps and ranks (of times too), so that all ranks have the same line."""
        self.update.check()
        waited = getattr(self.stage.stream, "waiting_s", 0.0) - self.waited_before
        since_update = time.perf_counter() - self.updated_at
        seconds = max(self.earlier_s + since_update, 1e-9)
        assert isinstance(self.sums, Tensor)
        sums = self.sums.double() / self.steps
        times = torch.tensor([seconds, waited, self.elapsed + since_update], dtype=torch.float64, device=sums.device)
        *means, seconds, waited, elapsed = distributed.mean_over_ranks(torch.cat([sums, times])).tolist()
        return {
            "stage": self.stage.name,
            "step": step,
            "steps": self.stage.steps,
            **dict(zip(self.update.metrics, means, strict=True)),
            "learning_rate": self.stage.optimizer.param_groups[0]["lr"],
            "images_per_s": self.steps * self.stage.images_per_step / seconds,
            "waiting_share": min(waited / seconds, 1.0),
            "elapsed_s": elapsed,
        }
