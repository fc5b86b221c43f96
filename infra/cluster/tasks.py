"""Runs functions as Ray tasks: `--workers N` of `metagmvae prepare` and `metagmvae features`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from metagmvae.infra.cluster.connect import cluster
from metagmvae.infra.cluster.worker_failures import failure_reason
from metagmvae.pipelines.records import DataError, MapTasks, WorkError

MAX_RETRIES = 3
"""How often a task is run again on another worker after its worker was lost."""


@contextmanager
def ray_map(workers: int, address: str = "", *, gpu: bool = False) -> Iterator[MapTasks]:
    """Yield a function that runs a function over argument tuples as Ray tasks, `workers` of them at the same time.

    Each task reserves one CPU. The first argument (the source), which is the same object in all
    tuples, is sent to the object store once. The task of a lost worker is run again. An error that the function
    raises is raised here unchanged, after the running tasks have ended.

    Args:
        workers: number of tasks at the same time.
        address: Ray cluster, see `metagmvae.infra.cluster.connect.cluster`.
        gpu: whether each task also reserves a GPU, if the cluster has any.

    Raises:
        SettingsError: the cluster cannot be reached, or has fewer CPUs than workers.
        DataError: `workers` is below 1.
    """
    if workers < 1:
        raise DataError(f"--workers is {workers}; give 1 or more")
    with cluster(address, workers):
        gpus = int(gpu and ray.cluster_resources().get("GPU", 0) >= 1)
        yield lambda function, tasks: _results(function, tasks, workers, gpus)


def _results(
    function: Callable[..., object], tasks: Sequence[tuple[Any, ...]], workers: int, gpus: int
) -> Iterator[object]:
    """Yield the results in the order of the tasks; at most `workers` tasks run at the same time."""
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=MAX_RETRIES)(function)
    shared: dict[int, Any] = {}
    pending = list(enumerate(tasks))[::-1]
    running: dict[Any, int] = {}
    done: dict[int, object] = {}
    next_number = 0
    try:
        while pending or running:
            while pending and len(running) < workers:
                number, arguments = pending.pop()
                running[remote.remote(*_put_source(arguments, shared))] = number
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(first)
            done[number] = ray.get(first)
            while next_number in done:
                yield done.pop(next_number)
                next_number += 1
    except RayTaskError as error:
        # Wait for the other running tasks, which take a shard each. Cancelling a task that is about to end can abort
        # this process (a race in Ray: "Tried to complete task that was not pending").
        if running:
            ray.wait(list(running), num_returns=len(running))
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except RayError as error:  # a lost worker, more often than `MAX_RETRIES`
        raise WorkError(f"a task on Ray failed: {failure_reason(error)}") from error


def _put_source(arguments: tuple[Any, ...], shared: dict[int, Any]) -> list[Any]:
    """Replace the first argument by a reference to its single copy in the object store."""
    source, *rest = arguments
    if id(source) not in shared:
        shared[id(source)] = ray.put(source)
    return [shared[id(source)], *rest]
