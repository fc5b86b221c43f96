"""The training loop: exact resume, no update from a non-finite loss, correct metric lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metagmvae.training.trainer.builders import build_schedule
from metagmvae.training.trainer.checkpoint import load_state, random_state, save_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.loop import Hooks, Stage, fit_stage
from metagmvae.training.trainer.update import NonFiniteLossError

STEPS = 20


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


class RandomBatches:
    """A stream whose batches depend on the step only."""

    def __init__(self, start: int) -> None:
        self.step = start
        self.waiting_s = 0.0
        self.closed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> tuple[Tensor]:
        self.step += 1
        self.waiting_s += 1e-6
        return (torch.randn(8, 3, generator=torch.Generator().manual_seed(self.step)),)

    def close(self) -> None:
        self.closed = True


class Regression(nn.Module):
    """Has batch normalisation for its buffers, and dropout because it uses the global random state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
        self.bad_step, self.factor = 0, float("nan")
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        error = (self.net(x)[:, 0] - x.sum(dim=1)).square()
        loss = error.mean()
        if self.calls == self.bad_step:
            loss = loss * self.factor
        return loss, {"largest": error.detach().max()}


class FolderContext(RunContext):
    """A context with checkpoints in a folder; raises `Killed` before it records the line of step `killed_at`."""

    device = torch.device("cpu")
    world = 1

    def __init__(self, folder: Path, killed_at: int = 0, rank: int = 0) -> None:
        self.path = folder / "checkpoint.pt"
        self.rank = rank
        self.killed_at = killed_at
        self.lines: list[MetricLine] = []
        self.states: list[TrainState | None] = []
        self.on_report: Callable[[], None] = lambda: None

    def load(self) -> TrainState | None:
        return load_state(self.path) if self.path.exists() else None

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        if self.killed_at and int(line["step"]) >= self.killed_at:
            raise Killed
        self.lines.append(line)
        self.states.append(state)
        self.on_report()
        if state is not None:
            save_state(self.path, state)


class Run:
    """Module, optimiser, schedule and stream, resumed from the folder if it has a checkpoint."""

    def __init__(
        self, context: FolderContext, clip: float = 0.0, log_every: int = 3, checkpoint_every: int = 5
    ) -> None:
        self.context = context
        self.module = Regression()
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.05)
        self.schedule = build_schedule(self.optimizer, "cosine", STEPS)
        saved = context.load()
        self.start = 0 if saved is None else saved["step"]
        if saved is None:
            torch.manual_seed(42)
        else:
            self.module.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            torch.set_rng_state(saved["rng"]["torch"])
        self.stream = RandomBatches(self.start)
        args = ("toy", STEPS, self.module, self.optimizer, self.schedule, self.stream)
        self.stage = Stage(*args, images_per_step=8, clip_norm=clip)
        self.validated: list[int] = []
        self.hooks = Hooks(self.state, self.after_step, log_every, checkpoint_every=5, validate_every=7)

    def state(self, step: int) -> TrainState:
        return {
            "kind": "encoder",
            "projector": {},
            "settings": "{}",
            "image_shape": [1, 1, 1],
            "data_fingerprint": "",
            "stage": "pretrain",
            "step": step,
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": random_state(),
            "best": {},
            "elapsed": 0.0,
        }

    def after_step(self, step: int) -> MetricLine:
        self.module.eval()
        self.validated.append(step)
        return {"extra": step}

    def fit(self, elapsed: float = 0.0) -> float:
        return fit_stage(self.stage, self.hooks, self.context, start=self.start, elapsed=elapsed)


def without_times(lines: list[MetricLine]) -> list[dict[str, Any]]:
    """Metric lines without times and rates."""
    times = {"images_per_s", "elapsed_s", "waiting_share"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for key in value for item in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flat(part)]
    return [value.tolist()] if isinstance(value, Tensor) else [value]


def test_fit_stage_equals_a_plain_loop(tmp_path: Path) -> None:
    run = Run(FolderContext(tmp_path))
    run.fit()
    module = Regression()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    schedule = build_schedule(optimizer, "cosine", STEPS)
    torch.manual_seed(42)
    stream, losses = RandomBatches(0), []
    for _ in range(STEPS):
        loss, _ = module(*next(stream))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert flat(module.state_dict()) == flat(run.module.state_dict())
    assert losses[-1] < losses[0]
    first = run.context.lines[0]
    assert first["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)


@pytest.mark.parametrize("killed_at", [4, 6, 10, 11, 18])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, killed_at: int) -> None:
    """Weights, running statistics, optimiser, schedule, random state and every number of every metric line."""
    uninterrupted = Run(FolderContext(tmp_path / "uninterrupted"))
    uninterrupted.fit()
    killed = Run(FolderContext(tmp_path / "killed", killed_at))
    with pytest.raises(Killed):
        killed.fit()
    torch.manual_seed(7)  # a new process has another random state
    resumed = Run(FolderContext(tmp_path / "killed"))
    assert resumed.start == (killed_at - 1) // 5 * 5
    resumed.fit()
    expected, actual = uninterrupted.context.load(), resumed.context.load()
    assert expected is not None
    assert actual is not None
    assert expected.keys() == actual.keys()
    for part in expected.keys() - {"elapsed"}:
        assert flat(expected[part]) == flat(actual[part]), part
    lines_before = [line for line in killed.context.lines if int(line["step"]) <= resumed.start]
    assert without_times(uninterrupted.context.lines) == without_times(lines_before) + without_times(
        resumed.context.lines
    )


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_loss_is_an_error_before_the_update(tmp_path: Path, factor: float) -> None:
    run = Run(FolderContext(tmp_path))
    run.module.bad_step, run.module.factor = 8, factor
    with pytest.raises(NonFiniteLossError, match=r"toy step 8: loss .*the update was not applied") as caught:
        run.fit()
    assert "\n" not in str(caught.value)
    assert "lower the learning rate" in str(caught.value)
    shorter = Run(FolderContext(tmp_path / "shorter"), log_every=7)
    shorter.context.killed_at = 7
    with pytest.raises(Killed):
        shorter.fit()
    assert flat(list(run.module.parameters())) == flat(list(shorter.module.parameters()))
    assert flat(run.optimizer.state_dict()) == flat(shorter.optimizer.state_dict())
    assert run.module.calls == 8
    saved = run.context.load()
    assert saved is not None
    assert saved["step"] == 5
    assert run.stream.closed


def test_non_finite_gradient_is_an_error_even_if_the_loss_is_finite(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.w.sqrt().sum() + x.sum() * 0, {}

    module = Root()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    stage = Stage("toy", 3, module, optimizer, build_schedule(optimizer, "constant", 3), RandomBatches(0), 8)
    hooks = Hooks(lambda step: {}, lambda step: {}, 1, 1)
    with pytest.raises(NonFiniteLossError, match="loss 0, gradient norm inf"):
        fit_stage(stage, hooks, FolderContext(tmp_path), start=0, elapsed=0.0)
    assert float(module.w.detach()) == 0.0


def test_metric_lines_and_checkpoints_are_reported_when_due(tmp_path: Path) -> None:
    run = Run(FolderContext(tmp_path))
    run.fit()
    steps = [line["step"] for line in run.context.lines]
    assert steps == [3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20] == run.validated
    saved = [line["step"] for line, s in zip(run.context.lines, run.context.states, strict=True) if s is not None]
    assert saved == [5, 10, 15, 20] == [line["step"] for line in run.context.lines if line["checkpoint"]]
    for line in run.context.lines:
        assert line["extra"] == line["step"]
        assert (line["stage"], line["steps"]) == ("toy", STEPS)
        assert {"loss", "largest", "gradient_norm", "learning_rate"} <= line.keys()
        assert all(type(value) in (int, float, str) for value in line.values())
        assert float(line["images_per_s"]) > 0
        assert 0 < float(line["waiting_share"]) <= 1
    assert run.module.training  # set again after the hooks called eval()


def test_other_ranks_report_as_often_without_checkpoints(tmp_path: Path) -> None:
    run = Run(FolderContext(tmp_path, rank=1))
    run.fit()
    assert [line["step"] for line in run.context.lines] == [3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20]
    assert run.context.states == [None] * 11
    assert [line["checkpoint"] for line in run.context.lines].count(1) == 4


def test_elapsed_time_continues_and_includes_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("metagmvae.training.trainer.loop.time.perf_counter", lambda: clock["now"])
    run = Run(FolderContext(tmp_path))
    run.module.register_forward_hook(lambda *_: clock.update(now=clock["now"] + 1.0))
    run.context.on_report = lambda: clock.update(now=clock["now"] + 100.0)
    assert run.fit(elapsed=50.0) == pytest.approx(50.0 + STEPS + 11 * 100.0)
    first, second = run.context.lines[:2]
    assert first["elapsed_s"] == pytest.approx(53.0)
    assert second["elapsed_s"] == pytest.approx(155.0)
    assert first["images_per_s"] == pytest.approx(8.0) == second["images_per_s"]  # without the time for saving
    saved = [s["elapsed"] for s in run.context.states if s is not None]
    assert saved[0] == pytest.approx(155.0)


def test_clipping_limits_the_gradient_and_the_reported_norm_is_unclipped(tmp_path: Path) -> None:
    run = Run(FolderContext(tmp_path), clip=1e-3, log_every=1)
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in run.module.parameters()]).norm()))
    )
    run.fit()
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert min(float(line["gradient_norm"]) for line in run.context.lines) > 1e-3


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Killed])
def test_stream_is_closed_after_success_and_after_errors(tmp_path: Path, interrupt: type[BaseException]) -> None:
    run = Run(FolderContext(tmp_path))

    def stop() -> None:
        raise interrupt

    run.context.on_report = stop
    with pytest.raises(interrupt):
        run.fit()
    assert run.stream.closed
    finished = Run(FolderContext(tmp_path / "other"))
    finished.fit()
    assert finished.stream.closed
