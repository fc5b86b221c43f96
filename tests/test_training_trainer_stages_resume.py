"""Killed, stopped and finished runs: resumed, they equal uninterrupted ones bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rank_processes import process_context
from small_runs import (
    SHAPE,
    FolderContext,
    assert_equal,
    flat,
    images,
    run,
    settings,
    uninterrupted,
    without_times,
)

from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import TrainState
from metagmvae.training.trainer.stages import train


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
@pytest.mark.parametrize("killed_at", [2, 6, 8, 11, 12, 15])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    reconstruct: str, killed_at: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed in pre-training (before and after its checkpoint), at its end, and in meta-training, always before the
    checkpoint of that step is written. The resumed process starts with another global random state."""
    expected_run = uninterrupted(reconstruct, tmp_path_factory)
    killed = FolderContext(tmp_path, killed_at)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(killed, settings(reconstruct))
    last = killed.saved[-1] if killed.saved else ("pretrain", 0)
    expected = {2: ("pretrain", 0), 6: ("pretrain", 4), 15: ("meta", 8)}
    assert last == expected.get(killed_at, ("meta", 4) if killed_at > 10 else ("pretrain", 6))
    if not killed.saved:
        torch.manual_seed(1)
    else:
        torch.manual_seed(killed_at)
    resumed = FolderContext(tmp_path)
    run(resumed, settings(reconstruct))
    assert_equal(expected_run.load(), resumed.load())
    reached = last[1] if last[0] == "pretrain" else 6 + last[1]
    lines_before = [line for line in killed.lines if int(line["global_step"]) <= reached]
    assert without_times(expected_run.lines) == without_times(lines_before) + without_times(resumed.lines)


def killed_process(folder: str, killed_at: int, threads: int) -> None:
    torch.set_num_threads(threads)  # the last bits of sums depend on the number of threads
    run(FolderContext(Path(folder), killed_at, signal_number=signal.SIGKILL), settings())


def test_run_of_a_killed_process_resumes_exactly(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected_run = uninterrupted("pixels", tmp_path_factory)
    process = process_context().Process(target=killed_process, args=(str(tmp_path), 12, torch.get_num_threads()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    resumed = FolderContext(tmp_path)
    assert load_state(resumed.path)["step"] == 4
    run(resumed, settings())
    left, right = expected_run.load(), resumed.load()
    assert left is not None
    assert right is not None
    for part in ("model", "optimizer", "schedule", "best"):
        assert flat(left[part]) == flat(right[part]), part


def test_finished_run_returns_at_once(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = uninterrupted("pixels", tmp_path_factory).load()
    assert done is not None
    save_state(tmp_path / "checkpoint.pt", done)
    finished = FolderContext(tmp_path)
    assert_equal(done, run(finished, settings()))
    assert finished.lines == []


def encoder_run(context: FolderContext) -> TrainState:
    options = settings(pretrain={"steps": 9, "projector": (6, 4), "optimizer": "lars"})
    return train(options, images(), SHAPE, "fingerprint", context, encoder_validate, kind="encoder")


def encoder_validate(model: EncoderModel) -> dict[str, dict[str, float]]:
    assert not isinstance(model, MetaGMVAE)
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return {"5w1s": {"accuracy": total % 1.0, "ci95": 0.1}, "linear": {"accuracy": 0.5}}


@pytest.mark.parametrize("killed_at", [2, 6, 9])
def test_killed_and_resumed_encoder_only_run_equals_the_uninterrupted_one(killed_at: int, tmp_path: Path) -> None:
    (tmp_path / "uninterrupted").mkdir()
    (tmp_path / "killed").mkdir()
    expected_run = FolderContext(tmp_path / "uninterrupted")
    torch.manual_seed(1)
    state = encoder_run(expected_run)
    killed = FolderContext(tmp_path / "killed", killed_at)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        encoder_run(killed)
    if killed.saved:
        torch.manual_seed(5)
    else:
        torch.manual_seed(1)
    resumed = FolderContext(tmp_path / "killed")
    encoder_run(resumed)
    assert_equal(expected_run.load(), resumed.load())
    assert state["kind"] == "encoder"
    assert set(state["projector"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(name.startswith("encoder.") for name in state["model"])
    validated = [line for line in expected_run.lines if "validation/5w1s" in line]
    assert [line["step"] for line in validated] == [3, 6, 9]
    assert all(line["validation/linear"] == 0.5 and "validation/linear_ci95" not in line for line in validated)
    assert set(state["best"]) == {"5w1s"}


class StoppedContext(FolderContext):
    """Requests a stop when the training has asked `stop_at` times: after each step but the last one of a stage."""

    def __init__(self, folder: Path, stop_at: int) -> None:
        super().__init__(folder)
        self.stop_at, self.asked = stop_at, 0

    @contextmanager
    def stop_requests(self) -> Iterator[Callable[[], bool]]:
        def stop() -> bool:
            self.asked += 1
            return self.asked == self.stop_at

        yield stop


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
@pytest.mark.parametrize(("stop_at", "stage", "step"), [(1, "pretrain", 1), (4, "pretrain", 4), (8, "meta", 3)])
def test_a_run_stopped_between_checkpoints_and_resumed_equals_an_uninterrupted_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, reconstruct: str, stop_at: int, stage: str, step: int
) -> None:
    """Bit-identical state and metric lines; a checkpoint is due at pre-training step 4, a validation at meta step 3."""
    expected = uninterrupted(reconstruct, tmp_path_factory)
    stopped = StoppedContext(tmp_path, stop_at)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, settings(reconstruct))
    state = load_state(stopped.path)
    assert (state["stage"], state["step"]) == (stage, step)
    torch.manual_seed(stop_at)
    resumed = FolderContext(tmp_path)
    run(resumed, settings(reconstruct))
    assert_equal(expected.load(), resumed.load())
    assert without_times(stopped.lines + resumed.lines) == without_times(expected.lines)
