"""One worker of a training on Ray: its run context, and the request to stop that it follows."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.train import Checkpoint
from ray.train.torch import get_device

from metagmvae.configs.load import settings_from_json
from metagmvae.infra.runs.run_folder import CHECKPOINT
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.pipelines.shards.manifest import check_node_copy
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.update import NonFiniteLossError

NON_FINITE = "non-finite"
"""Key of a report, and name of a file in Ray's folder, with the message of a loss that is not finite."""
STOPPED = "stopped"
"""Key of the last report before a requested stop, and name of a file in Ray's folder once it has been written."""
REPORT_INTERVAL_S = 2.0
"""Seconds of training between reports without a checkpoint; Ray processes about five reports per second."""
STOP_POLL_S = 0.5
"""Seconds between a worker's questions whether it must stop."""


class RayContext(RunContext):
    """One rank of a Ray Train worker group."""

    def __init__(self, initial_checkpoint: bytes | None, stop_flag: Any = None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = get_device()
        self._initial_checkpoint = initial_checkpoint
        self._stop_flag = stop_flag
        self._lines: list[MetricLine] = []
        self._reported_s = 0.0

    def load(self) -> TrainState | None:
        """Return the last checkpoint reported to Ray; at the start of a resumed run, that of the run folder."""
        reported = ray.train.get_checkpoint()
        if reported is not None:
            with reported.as_directory() as folder:
                return load_state(Path(folder) / CHECKPOINT)
        if self._initial_checkpoint is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CHECKPOINT
            path.write_bytes(self._initial_checkpoint)
            return load_state(path)

    @contextmanager
    def stop_requests(self) -> Iterator[Callable[[], bool]]:
        """A signal to the driver stops the training; the loop lets all ranks agree on the step."""
        requested, ended = threading.Event(), threading.Event()

        def follow() -> None:
            with suppress(RayError):  # the driver is gone
                while not (ended.wait(STOP_POLL_S) or requested.is_set()):
                    if ray.get(self._stop_flag.poll.remote()):
                        requested.set()

        if self._stop_flag is not None:
            threading.Thread(target=follow, name="stop-requests", daemon=True).start()
        try:
            yield requested.is_set
        finally:
            ended.set()

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        """Report to Ray: every line with a checkpoint, other lines collected for `REPORT_INTERVAL_S`."""
        if line is not None:
            self._lines.append(line)
            # The lines, including `elapsed_s`, are equal on all ranks, so all ranks report at the same steps.
            elapsed = float(line["elapsed_s"])
            if not line["checkpoint"] and 0 <= elapsed - self._reported_s < REPORT_INTERVAL_S:
                return
            self._reported_s = elapsed
        metrics: dict[str, Any] = {"lines": json.dumps(self._lines, allow_nan=False) if self.rank == 0 else "[]"}
        if line is None:
            metrics[STOPPED] = True
        self._lines = []
        if state is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder) / CHECKPOINT, state)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    def report_non_finite(self, error: NonFiniteLossError) -> None:
        """Report a loss that is not finite, which all ranks find at the same step, as the last report of the run."""
        ray.train.report({"lines": json.dumps(self._lines) if self.rank == 0 else "[]", NON_FINITE: str(error)})


def train_worker(config: dict[str, Any]) -> None:
    """Run the training of one worker; the same as that of the local engine.

    Args:
        config: `settings` as JSON, URI of the `data` and their `fingerprint`, `kind`, `checkpoint` of the run folder or
            None, and `stop_flag`.

    Raises:
        DataError: this node has other data at the URI.
    """
    settings = settings_from_json(config["settings"])
    context = RayContext(config["checkpoint"], config["stop_flag"])
    if not settings.run.threads:
        torch.set_num_threads(settings.run.cpus_per_worker)
    dataset = Dataset.open(config["data"])
    check_node_copy(config["data"], dataset.fingerprint, config["fingerprint"])
    try:
        train_in_process(load_inputs(settings, dataset), context, config["kind"])
    except NonFiniteLossError as error:
        # Not raised: Ray would restart the workers, with the same result.
        context.report_non_finite(error)
    except KeyboardInterrupt:
        pass  # the driver has received a signal; the checkpoint is reported
