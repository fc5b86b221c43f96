"""The loop: the same bits after a kill and a resume, no update from a non-finite loss, honest lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metagmvae.training.trainer.builders import build_schedule
from metagmvae.training.trainer.checkpoint import load_state, random_state, save_state
from metagmvae.training.trainer.context import MetricLine, TrainState
from metagmvae.training.trainer.loop import Hooks, NonFiniteLossError, Stage, fit_stage

STEPS = 20


class Killed(Exception):
    """What stands for a kill: nothing after it runs."""


class Numbers:
    """A stream that is a function of the step alone."""

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
    """Batch normalisation for its buffers, dropout for its use of global random state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
        self.spoil_at, self.spoil = 0, float("nan")
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        error = (self.net(x)[:, 0] - x.sum(dim=1)).square()
        loss = error.mean()
        if self.spoil_at and self.calls == self.spoil_at:
            loss = loss * self.spoil
        return loss, {"largest": error.detach().max()}


class Folder:
    """A rank with a folder; `killed_at` ends it before the line of that step is written."""

    device = torch.device("cpu")
    world = 1

    def __init__(self, folder: Path, killed_at: int = 0, rank: int = 0) -> None:
        self.path = folder / "checkpoint.pt"
        self.rank = rank
        self.killed_at = killed_at
        self.lines: list[MetricLine] = []
        self.states: list[TrainState | None] = []
        self.during: Callable[[], None] = lambda: None

    def load(self) -> TrainState | None:
        return load_state(self.path) if self.path.exists() else None

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        if self.killed_at and int(line["step"]) >= self.killed_at:
            raise Killed
        self.lines.append(line)
        self.states.append(state)
        self.during()
        if state is not None:
            save_state(self.path, state)


class Run:
    """Module, optimiser, schedule and stream, resumed from the folder if it holds a checkpoint."""

    def __init__(self, where: Folder, clip: float = 0.0, log_every: int = 3, checkpoint_every: int = 5) -> None:
        self.where = where
        self.module = Regression()
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.05)
        self.schedule = build_schedule(self.optimizer, "cosine", STEPS)
        saved = where.load()
        self.start = 0 if saved is None else saved["step"]
        if saved is None:
            torch.manual_seed(42)
        else:
            self.module.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            torch.set_rng_state(saved["rng"]["torch"])
        self.stream = Numbers(self.start)
        args = ("toy", STEPS, self.module, self.optimizer, self.schedule, self.stream)
        self.stage = Stage(*args, images_per_step=8, clip_norm=clip)
        self.validated: list[int] = []
        self.hooks = Hooks(self.state, self.after, log_every, checkpoint_every, validate_every=7)

    def state(self, step: int) -> TrainState:
        return {
            "kind": "toy",
            "projector": {},
            "settings": "{}",
            "image_shape": [1],
            "data_fingerprint": "",
            "stage": "toy",
            "step": step,
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": random_state(),
            "best": {},
            "elapsed": 0.0,
        }

    def after(self, step: int) -> MetricLine:
        self.module.eval()
        self.validated.append(step)
        return {"extra": step}

    def go(self, elapsed: float = 0.0) -> float:
        return fit_stage(self.stage, self.hooks, self.where, start=self.start, elapsed=elapsed)


def numbers(lines: list[MetricLine]) -> list[dict[str, Any]]:
    """Metric lines without the clock."""
    clock = {"images_per_s", "elapsed_s", "waiting_share"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for key in value for item in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flat(part)]
    return [value.tolist()] if isinstance(value, Tensor) else [value]


def test_fit_is_the_loop_written_out(tmp_path: Path) -> None:
    run = Run(Folder(tmp_path))
    run.go()
    module = Regression()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    schedule = build_schedule(optimizer, "cosine", STEPS)
    torch.manual_seed(42)
    stream, losses = Numbers(0), []
    for _ in range(STEPS):
        loss, _ = module(*next(stream))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert flat(module.state_dict()) == flat(run.module.state_dict())
    assert losses[-1] < losses[0]
    first = run.where.lines[0]
    assert first["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)


@pytest.mark.parametrize("killed_at", [4, 6, 10, 11, 18])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, killed_at: int) -> None:
    """Weights, running statistics, optimiser, schedule, random state and every number of every line."""
    whole = Run(Folder(tmp_path / "whole"))
    whole.go()
    killed = Run(Folder(tmp_path / "parts", killed_at))
    with pytest.raises(Killed):
        killed.go()
    torch.manual_seed(7)  # another process has another random state
    resumed = Run(Folder(tmp_path / "parts"))
    assert resumed.start == (killed_at - 1) // 5 * 5
    resumed.go()
    theirs, ours = whole.where.load(), resumed.where.load()
    assert theirs is not None
    assert ours is not None
    assert theirs.keys() == ours.keys()
    for part in theirs.keys() - {"elapsed"}:
        assert flat(theirs[part]) == flat(ours[part]), part
    kept = [line for line in killed.where.lines if int(line["step"]) <= resumed.start]
    assert numbers(whole.where.lines) == numbers(kept) + numbers(resumed.where.lines)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_refused_before_the_update(tmp_path: Path, spoil: float) -> None:
    run = Run(Folder(tmp_path))
    run.module.spoil_at, run.module.spoil = 8, spoil
    with pytest.raises(NonFiniteLossError, match=r"toy step 8: loss .*the update was not applied") as caught:
        run.go()
    assert "\n" not in str(caught.value)
    assert "lower the learning rate" in str(caught.value)
    sound = Run(Folder(tmp_path / "sound"), log_every=7)
    sound.where.killed_at = 7
    with pytest.raises(Killed):
        sound.go()
    assert flat(list(run.module.parameters())) == flat(list(sound.module.parameters()))
    assert flat(run.optimizer.state_dict()) == flat(sound.optimizer.state_dict())
    assert run.module.calls == 8
    saved = run.where.load()
    assert saved is not None
    assert saved["step"] == 5
    assert run.stream.closed


def test_a_gradient_that_is_not_finite_is_refused_although_the_loss_is(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.w.sqrt().sum() + x.sum() * 0, {}

    module = Root()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    stage = Stage("toy", 3, module, optimizer, build_schedule(optimizer, "constant", 3), Numbers(0), 8)
    hooks = Hooks(lambda step: {}, lambda step: {}, 1, 1)
    with pytest.raises(NonFiniteLossError, match="loss 0, gradient norm inf"):
        fit_stage(stage, hooks, Folder(tmp_path), start=0, elapsed=0.0)
    assert float(module.w.detach()) == 0.0


def test_lines_and_states_come_when_they_are_due(tmp_path: Path) -> None:
    run = Run(Folder(tmp_path))
    run.go()
    steps = [line["step"] for line in run.where.lines]
    assert steps == [3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20] == run.validated
    saved = [line["step"] for line, s in zip(run.where.lines, run.where.states, strict=True) if s is not None]
    assert saved == [5, 10, 15, 20] == [line["step"] for line in run.where.lines if line["checkpoint"]]
    for line in run.where.lines:
        assert line["extra"] == line["step"]
        assert (line["stage"], line["steps"]) == ("toy", STEPS)
        assert {"loss", "largest", "gradient_norm", "learning_rate"} <= line.keys()
        assert all(type(value) in (int, float, str) for value in line.values())
        assert float(line["images_per_s"]) > 0
        assert 0 < float(line["waiting_share"]) <= 1
    assert run.module.training  # put back after the hooks' eval()


def test_other_ranks_report_as_often_and_keep_no_state(tmp_path: Path) -> None:
    run = Run(Folder(tmp_path, rank=1))
    run.go()
    assert [line["step"] for line in run.where.lines] == [3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20]
    assert run.where.states == [None] * 11
    assert [line["checkpoint"] for line in run.where.lines].count(1) == 4


def test_elapsed_time_goes_on_from_what_was_there_and_counts_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("metagmvae.training.trainer.loop.time.perf_counter", lambda: clock["now"])
    run = Run(Folder(tmp_path))
    run.module.register_forward_hook(lambda *_: clock.update(now=clock["now"] + 1.0))
    run.where.during = lambda: clock.update(now=clock["now"] + 100.0)
    assert run.go(elapsed=50.0) == pytest.approx(50.0 + STEPS + 11 * 100.0)
    first, second = run.where.lines[:2]
    assert first["elapsed_s"] == pytest.approx(53.0)
    assert second["elapsed_s"] == pytest.approx(155.0)
    assert first["images_per_s"] == pytest.approx(8.0) == second["images_per_s"]  # saving is no training
    saved = [s["elapsed"] for s in run.where.states if s is not None]
    assert saved[0] == pytest.approx(155.0)


def test_clipping_bounds_the_gradient_and_reports_the_norm_before(tmp_path: Path) -> None:
    run = Run(Folder(tmp_path), clip=1e-3, log_every=1)
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in run.module.parameters()]).norm()))
    )
    run.go()
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert min(float(line["gradient_norm"]) for line in run.where.lines) > 1e-3


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Killed])
def test_the_stream_is_closed_however_it_ends(tmp_path: Path, interrupt: type[BaseException]) -> None:
    run = Run(Folder(tmp_path))

    def stop() -> None:
        raise interrupt

    run.where.during = stop
    with pytest.raises(interrupt):
        run.go()
    assert run.stream.closed
    finished = Run(Folder(tmp_path / "other"))
    finished.go()
    assert finished.stream.closed
