"""The only training loop: an iterable of batches and a few hooks come in, nothing reaches out."""

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
    """The loss or a gradient is not finite; the update was refused and the last checkpoint stays."""


@dataclass(frozen=True)
class Stage:
    """One thing to train: batches -> (loss, terms), for a fixed number of steps."""

    name: str
    steps: int
    module: nn.Module
    """Wrapped for data parallelism already."""
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    stream: Iterator[Any]
    """Yields the arguments of `module`, from the step to start at; may have `waiting_s` and `close()`."""
    images_per_step: int
    """Over all ranks, for the rate that is reported."""
    clip_norm: float = 0.0


@dataclass(frozen=True)
class Hooks:
    """What happens between steps; called on all ranks."""

    state: Callable[[int], TrainState]
    """The checkpoint after a step."""
    after_step: Callable[[int], MetricLine]
    """What to add to the metric line of a step: its place in the run, validation where it is due."""
    log_every: int
    checkpoint_every: int
    validate_every: int = 0
    """Steps between validations, each with a metric line; 0: none."""

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.log_every, self.validate_every))


def fit(stage: Stage, hooks: Hooks, surroundings: RunContext, *, start: int, elapsed: float) -> float:
    """Train from step `start` to the end of the stage; return the seconds trained in all.

    A checkpoint is due every `checkpoint_every` steps and after the last one. Averages in metric lines
    restart at each line, and a line is written at each checkpoint, so a resumed run writes the same lines.

    Raises:
        NonFiniteLossError: before the update, on all ranks in the same step (a gradient that is not finite on
            one rank is not finite on any, once it is averaged).
    """
    window = _Window(stage, elapsed)
    stage.module.train()
    try:
        for step in range(start + 1, stage.steps + 1):
            loss, terms = stage.module(*next(stage.stream))
            norm = _update(stage, loss, step)
            window.add(loss, terms, norm)
            checkpoint = step % hooks.checkpoint_every == 0 or step == stage.steps
            if hooks.due(step) or checkpoint:
                line = window.line(step) | hooks.after_step(step) | {"checkpoint": int(checkpoint)}
                due = checkpoint and surroundings.rank == 0
                window.pause()
                surroundings.report(line, hooks.state(step) | {"elapsed": window.elapsed} if due else None)
                window.restart()
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
            f"{stage.name} step {step}: loss {loss.item():g}, gradient norm {norm.item():g}; the update was "
            "refused and the last checkpoint stays: lower the learning rate, or set train.clip_norm"
        )
    stage.optimizer.step()
    stage.schedule.step()
    return norm


class _Window:
    """Averages and rates since the last metric line."""

    def __init__(self, stage: Stage, elapsed: float) -> None:
        self.stage = stage
        self.elapsed = elapsed
        self.since = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self.pause()
        self.waited_before = getattr(self.stage.stream, "waiting_s", 0.0)
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def pause(self) -> None:
        """Count the time up to here; what follows until `restart` (saving) is counted as well."""
        now = time.perf_counter()
        self.elapsed += now - self.since
        self.since = now

    def add(self, loss: Tensor, terms: dict[str, Tensor], norm: Tensor) -> None:
        self.steps += 1
        for name, value in {"loss": loss.detach(), **terms, "gradient_norm": norm.detach()}.items():
            self.sums[name] = self.sums[name] + value.float() if name in self.sums else value.float()

    def line(self, step: int) -> MetricLine:
        """Means over steps and ranks; the clocks are means over ranks too, so the line is equal on all of them."""
        waited = getattr(self.stage.stream, "waiting_s", 0.0) - self.waited_before
        seconds = max(time.perf_counter() - self.since, 1e-9)
        names = list(self.sums)
        sums = torch.stack([self.sums[name] for name in names]).double() / self.steps
        clocks = torch.tensor([seconds, waited, self.elapsed + seconds], dtype=torch.float64, device=sums.device)
        *means, seconds, waited, elapsed = distributed.mean_over_ranks(torch.cat([sums, clocks])).tolist()
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
