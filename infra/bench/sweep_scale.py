"""`metagmvae bench sweep-scale`: a sweep of 10,000 trials on 100 nodes, simulated: what breaks first.

Three kinds of numbers: what this machine measured on simulated trials (files, report, search, MLflow), what a cluster
would need (arithmetic from stated sizes), and from both the parts in the order in which they give out.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from uuid import uuid4

from metagmvae.configs.schema import Settings, TrackingSettings
from metagmvae.evaluation.sweeps.simulation import Simulated, simulate
from metagmvae.evaluation.sweeps.trials import Trial
from metagmvae.infra.tracking.convert import parameters
from metagmvae.infra.tracking.store import Store, connect, experiment_id, redact, tracking_errors
from metagmvae.pipelines.records import DataError

NODES, AT_ONCE_PER_NODE, TRIAL_S, CHECKPOINTS = 100, 8, 300.0, 9
"""The cluster on paper: nodes, trials at once on each (one a GPU), seconds and checkpoints of a trial."""
PARENT = "mlflow.parentRunId"
PAGE = 1000


def bench_sweep_scale(counts: Sequence[int], runs: int, stores: Sequence[str], writers: int) -> dict[str, Any]:
    """Measure all parts.

    Args:
        counts: numbers of simulated trials in files, rising.
        runs: trials that are written into each MLflow store.
        stores: URIs of MLflow stores beside a new SQLite file: a server's, or a database's. Who writes is not part of
            them (PGUSER and PGPASSWORD, or a password file, say that of PostgreSQL).
        writers: processes that write at the same time, as nodes would; 0 leaves that out.

    Raises:
        DataError: a URI holds a name or a password.
        TrackingError: a store cannot be reached.
    """
    from metagmvae.evaluation.bench.sweep_files import bench_files

    for uri in stores:
        if redact(uri) != uri:
            raise DataError("--stores: a URI must not hold a name or a password; set PGUSER and PGPASSWORD instead")
    load = os.getloadavg()[0]  # a busy machine is a slower one, and the record shall say so
    with tempfile.TemporaryDirectory() as folder:
        tracking = [TrackingSettings(store=folder), *[TrackingSettings(uri=uri) for uri in stores]]
        for one in tracking:  # one that cannot be reached shall be known at once, not after minutes
            store = connect(one)
            with tracking_errors(store.uri):
                store.client.search_experiments(max_results=1)
        mlflow = [bench_store(one, runs, writers) for one in tracking]
    files = bench_files(counts)
    needed = NODES * AT_ONCE_PER_NODE / TRIAL_S
    return {
        "nodes": NODES,
        "trials_at_once": NODES * AT_ONCE_PER_NODE,
        "trial_s": TRIAL_S,
        "trials_per_s_needed": needed,
        "load_average_before": load,
        "files": files,
        "mlflow": mlflow,
        "checkpoints": checkpoint_traffic(),
        "limits": limits(files[-1], mlflow, needed),
    }


def limits(files: dict[str, Any], mlflow: Sequence[dict[str, Any]], needed: float) -> list[dict[str, Any]]:
    """Parts of the driver by how many trials a second each bears, the first to give out first."""
    bears = {
        f"TPE's suggestion after {files['trials']:,} trials": 1000 / files["suggest_cpu_ms"],
        "a line in trials.jsonl": 1000 / files["append_ms"],
    }
    for row in mlflow:
        bears[f"MLflow, value by value: {row['store']}"] = row["value_by_value_per_s"]
        bears[f"MLflow, in batches: {row['store']}"] = row["batched_per_s"]
        if row["writers"]:
            bears[f"MLflow, in batches, {row['writers']} processes: {row['store']}"] = row["together_per_s"]
    rows = [{"part": part, "trials_per_s": rate, "times_needed": rate / needed} for part, rate in bears.items()]
    return sorted(rows, key=lambda row: float(row["trials_per_s"]))


def checkpoint_traffic() -> dict[str, Any]:
    """What checkpoints of all trials would put on shared storage, from the size of the paper's model with Adam."""
    from metagmvae.training.trainer.builders import build_model

    values = sum(weight.numel() for weight in build_model(Settings().model, (1, 28, 28), 0).parameters())
    size = 3 * 4 * values  # weights and two moments of Adam, float32
    rate = NODES * AT_ONCE_PER_NODE * CHECKPOINTS / TRIAL_S
    return {
        "mb": size / 1e6,
        "per_s": rate,
        "shared_mb_per_s": rate * size / 1e6,
        "node_mb_per_s": rate * size / 1e6 / NODES,
        "kept_gb_of_10000_trials": 10_000 * size / 1e9,
    }


def bench_store(tracking: TrackingSettings, runs: int, writers: int) -> dict[str, Any]:
    """Write simulated trials into a store as children of a parent, in three manners, and list them.

    Everything is written into an experiment of its own, which is deleted at the end.
    """
    store = connect(tracking)
    trials, few = _simulated(runs), _simulated(max(2, runs // 20))
    with _experiment(store) as experiment, tracking_errors(store.uri):
        parent = store.client.create_run(experiment).info.run_id
        busy = time.process_time()
        seconds = [_timed(_batched, store, experiment, parent, trial) for trial in trials]
        busy = time.process_time() - busy
        singly = [_timed(_value_by_value, store, experiment, parent, trial) for trial in few]
        together = {"together_per_s": _together(tracking, experiment, parent, runs, writers)} if writers else {}
        since = time.perf_counter()
        found = _children(store, experiment, parent)
        listing = time.perf_counter() - since
    half = len(seconds) // 2
    return {
        "store": _kind(store.uri),
        "trials": runs,
        "points_a_trial": 4 * len(trials[0].curve),
        "batched_per_s": runs / sum(seconds),
        "client_cpu_ms": 1000 * busy / runs,
        "second_half_over_first": sum(seconds[half:]) / sum(seconds[: 2 * half - half]),
        "value_by_value_per_s": len(few) / sum(singly),
        "writers": writers,
        **together,
        "list_s_per_1000": 1000 * listing / found,
    }


def _simulated(count: int) -> list[Trial]:
    """Trials to write, all trained to the end."""
    return simulate(Simulated(trials=count, asha=False))


def _kind(uri: str) -> str:
    return "SQLite" if uri.startswith("sqlite") else redact(uri)


@contextmanager
def _experiment(store: Store) -> Iterator[str]:
    """An experiment for the benchmark alone."""
    made = experiment_id(store, f"bench-sweep-scale-{uuid4().hex[:8]}")
    try:
        yield made
    finally:
        with tracking_errors(store.uri):
            store.client.delete_experiment(made)


def _timed(work: Callable[..., object], *arguments: object) -> float:
    since = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - since


def _begun(store: Store, experiment: str, parent: str, trial: Trial) -> str:
    tags = {PARENT: parent, "metagmvae.trial": str(trial.number)}
    return store.client.create_run(experiment, tags=tags, run_name=f"trial-{trial.number:05d}").info.run_id


def _points(trial: Trial) -> list[tuple[str, float, int, int]]:
    """Four values a validation: key, value, time (ms), step."""
    return [
        (key, value, round(1000 * point.seconds), point.step)
        for point in trial.curve
        for key, value in (
            ("validation/5w1s", point.accuracy),
            ("validation/5w1s_ci95", point.ci95),
            ("loss", 1 - point.accuracy),
            ("elapsed_s", point.seconds),
        )
    ]


def _batched(store: Store, experiment: str, parent: str, trial: Trial) -> None:
    """Three requests a trial, as `tune` does."""
    from mlflow.entities import Metric, Param

    run_id = _begun(store, experiment, parent, trial)
    values = parameters(Settings().model_dump(mode="json")) | {k: str(v) for k, v in trial.settings.items()}
    params = [Param(key, value) for key, value in values.items()][:100]
    store.client.log_batch(run_id, metrics=[Metric(*point) for point in _points(trial)], params=params)
    store.client.set_terminated(run_id)


def _value_by_value(store: Store, experiment: str, parent: str, trial: Trial) -> None:
    """A request for each setting and each value of a validation, as training loops do that log as they go."""
    run_id = _begun(store, experiment, parent, trial)
    for key, value in trial.settings.items():
        store.client.log_param(run_id, key, value)
    for key, value, at, step in _points(trial):
        store.client.log_metric(run_id, key, value, at, step)
    store.client.set_terminated(run_id)


def _together(tracking: TrackingSettings, experiment: str, parent: str, runs: int, writers: int) -> float:
    """Trials a second of several processes that write at the same time."""
    with ProcessPoolExecutor(writers, get_context("spawn")) as pool:

        def write(count: int) -> None:
            same = [(tracking, experiment, parent, count)] * writers
            list(pool.map(_write_some, *zip(*same, strict=True)))

        write(2)  # imports, untimed
        each = max(1, runs // writers)
        since = time.perf_counter()
        write(each)
        return writers * each / (time.perf_counter() - since)


def _write_some(tracking: TrackingSettings, experiment: str, parent: str, count: int) -> None:
    store = connect(tracking)
    for trial in _simulated(count):
        _batched(store, experiment, parent, trial)


def _children(store: Store, experiment: str, parent: str) -> int:
    """Read all children of a parent, a page at a time; return how many."""
    found, page = 0, None
    while True:
        runs = store.client.search_runs(
            [experiment], f"tags.`{PARENT}` = '{parent}'", max_results=PAGE, page_token=page
        )
        found, page = found + len(runs), runs.token
        if not page:
            return found
