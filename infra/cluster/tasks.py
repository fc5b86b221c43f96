"""Shard tasks as Ray tasks: `prepare --workers N`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from metagmvae.infra.cluster.connect import cluster
from metagmvae.pipelines.records import DataError, MapTasks

RETRIES = 3
"""Times that a task is given to another worker when its own was lost."""


@contextmanager
def ray_map(workers: int, address: str = "", gpus: int = 0) -> Iterator[MapTasks]:
    """Run functions over argument tuples as Ray tasks, `workers` at once, on a cluster that is joined or started.

    Each task has one CPU, and `gpus` GPUs, to itself.

    What is the same object in all tuples (the source) travels once. A lost worker's task is run again by
    another; an error that the function raises is raised here as it was, once the tasks in flight have ended.

    Raises:
        SettingsError: the cluster cannot be reached, or has fewer CPUs than workers.
        DataError: fewer than one worker was asked for.
    """
    if workers < 1:
        raise DataError(f"--workers is {workers}; give 1 or more")
    with cluster(address, workers):
        yield lambda function, tasks: _results(function, tasks, workers, gpus)


def _results(
    function: Callable[..., object], tasks: Sequence[tuple[Any, ...]], workers: int, gpus: int
) -> Iterator[object]:
    """Results in the order of the tasks; never more than `workers` tasks in flight."""
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(function)
    shared: dict[int, Any] = {}
    waiting = list(enumerate(tasks))[::-1]
    running: dict[Any, int] = {}
    done: dict[int, object] = {}
    due = 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, arguments = waiting.pop()
                running[remote.remote(*_put(arguments, shared))] = number
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(first)
            done[number] = ray.get(first)
            while due in done:
                yield done.pop(due)
                due += 1
    except RayTaskError as error:
        # The others end by themselves, a shard each. Cancelling a task that is just about to end can abort this very
        # process (a race in Ray: "Tried to complete task that was not pending").
        if running:
            ray.wait(list(running), num_returns=len(running))
        raise error.cause if isinstance(error.cause, Exception) else error from error


def _put(arguments: tuple[Any, ...], shared: dict[int, Any]) -> list[Any]:
    """The first argument, the same object in all tasks, goes into the object store once."""
    source, *rest = arguments
    if id(source) not in shared:
        shared[id(source)] = ray.put(source)
    return [shared[id(source)], *rest]
