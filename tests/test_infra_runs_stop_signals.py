"""Ctrl-C and SIGTERM end a training at a step, save it, and say in one line what continues it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_words import TINY, set_words
from small_runs import flat, without_times

from metagmvae.infra.cli import main
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS
from metagmvae.infra.runs.stop_signals import Terminated, deferred_signals, explain_stop, raised_signals
from metagmvae.training.trainer.checkpoint import load_state

RUN = TINY | {
    "pretrain.steps": 3,
    "train.steps": 60,
    "train.checkpoint_every": 50,
    "train.log_every": 20,
    "validation.every": 0,
    "run.figures": "false",
    "run.threads": 1,
}
SLOW = """
import sys, time
from metagmvae.training.trainer import loop
class Slow(loop.distributed.StopVote):
    def __call__(self, step):
        print(step, flush=True)
        time.sleep(0.05)
        return super().__call__(step)
loop.distributed.StopVote = Slow
from metagmvae.infra.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command, with a line on standard output after each step and a pause in which a signal is certain to come."""


def words(data: Path, out: Path, command: str = "train") -> list[str]:
    return [command, "omniglot-5way", *set_words(RUN | {"data.uri": data, "run.out": out})]


def stopped(arguments: list[str], steps: int, *numbers: int) -> tuple[int, str]:
    """Run a command, send it signals after a number of steps; return exit code and standard error."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], **pipes)
    assert process.stdout is not None
    for _ in range(steps):
        process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.01)
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


def content(run: Path) -> tuple[list[Any], list[Any]]:
    """Checkpoint and metric lines, without times, the folder's name, and the process's own random numbers."""
    state = {k: v for k, v in load_state(run / CHECKPOINT).items() if k not in ("elapsed", "settings", "rng")}
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return flat(state), without_times(lines)


@pytest.fixture(scope="module", params=["train", "pretrain"])
def uninterrupted(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("signals") / "run"
    assert main(words(data, out, request.param)) == 0
    return request.param, content(out)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    uninterrupted: Any, data: Path, tmp_path: Path, number: int, code: int, name: str
) -> None:
    command, expected = uninterrupted
    out, steps = tmp_path / "my run", 2 if command == "pretrain" else 7
    returned, error = stopped(words(data, out, command), steps, number)
    assert returned == code, error
    state = load_state(out / CHECKPOINT)
    resume = f"metagmvae {command} {shlex.quote(str(out))} --resume"
    saved = f"{state['stage']} step {state['step']} is saved; continue with: {resume}"
    assert error == f"metagmvae {command}: stopped by {name}: {saved}\n"
    assert state["stage"] == ("pretrain" if command == "pretrain" else "meta")
    assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    assert main(shlex.split(resume)[1:]) == 0
    assert content(out) == expected


def test_a_second_signal_stops_at_once_and_keeps_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    arguments = words(data, tmp_path / "run")
    code, error = stopped(arguments, 7, signal.SIGTERM, signal.SIGTERM)
    assert code == 143
    assert error.count("\n") == 1
    assert load_state(tmp_path / "run" / CHECKPOINT)["step"] in (3, 5, 6)


def test_a_training_stopped_before_its_first_step_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def stop(*arguments: Any) -> None:
        raise Terminated

    monkeypatch.setattr("metagmvae.infra.workflows.run_training.train_in_process", stop)
    assert main(words(data, tmp_path / "run")) == 143
    assert capsys.readouterr().err.endswith("stopped by SIGTERM: no step was saved; run the command again\n")
    monkeypatch.undo()
    assert main(words(data, tmp_path / "run")) == 0


def test_signals_are_deferred_and_raised_at_the_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    answers = []

    def receive() -> None:
        with deferred_signals() as requested:
            for _ in range(2):
                answers.append(requested())
                if len(answers) == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        receive()
    assert answers == [False, True]
    with raised_signals(), pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_is_recognised_behind_a_library_that_raises_a_plain_interrupt() -> None:
    """Ray does, if the signal comes while it waits for a result."""

    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            error = KeyboardInterrupt()
            error.add_note("two trials have ended")
            raise error from None

    def run() -> None:
        with raised_signals():
            wait()

    with pytest.raises(Terminated) as caught:
        run()
    assert explain_stop(caught.value) == ("stopped by SIGTERM: two trials have ended", 143)


def test_a_signal_that_the_parent_process_ignores_stays_ignored() -> None:
    """nohup, and jobs of a script in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raised_signals(), deferred_signals() as requested:
            os.kill(os.getpid(), signal.SIGINT)
            assert not requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_line_of_a_command_without_a_note_says_that_it_can_be_run_again() -> None:
    assert explain_stop(KeyboardInterrupt()) == (
        "stopped by Ctrl-C: nothing was changed by halves; run the command again",
        130,
    )
