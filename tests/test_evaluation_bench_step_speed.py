"""The processes of `bench step`: one that dies is one error line that names memory."""

import os
import signal
from multiprocessing import get_context

import pytest

from metagmvae.evaluation.bench.step_speed import _Child
from metagmvae.pipelines.records import WorkError


def _killed(pipe):
    pipe.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def _failing(pipe):
    pipe.recv()
    pipe.send(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    pipe.recv()
    pipe.send(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def child(target):
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Child("R=1", process, ours)


def test_a_process_that_is_killed_names_memory():
    killed = child(_killed)
    for question in ("step", "memory"):  # the second one meets a closed pipe
        with pytest.raises(WorkError, match=r"'R=1' ended \(exit code -9\), probably because memory ran out: .* GiB"):
            killed.ask(question)


def test_an_allocation_that_fails_names_memory_and_other_errors_stay():
    failing = child(_failing)
    with pytest.raises(WorkError, match="'R=1' ran out of memory"):
        failing.ask("step")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        failing.ask("step")
