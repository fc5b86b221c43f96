"""Meta-training under Ray Train: data parallel over any number of workers, with replacement of lost ones.

The run folder is the truth here too. Rank 0 reports metric lines and checkpoints; a callback in Ray's controller,
which runs on the driver's node, puts them into the run folder. A lost worker restarts the group from the
last checkpoint that the controller took. A lost driver is another matter: `--resume` starts a new Ray run that
is handed the checkpoint of the run folder, so nothing depends on what Ray kept of the old one.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from metagmvae.configs.load import settings_from_json, to_json
from metagmvae.configs.schema import Settings
from metagmvae.infra.cluster.connect import cluster, cluster_address
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS, append_lines, drop_lines_after, global_step
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, TrainState
from metagmvae.training.trainer.loop import NonFiniteLossError
from metagmvae.training.trainer.stages import ModelKind

FOLDER = "ray"
REFUSED = "refused"
REPORT_S = 2.0
"""Seconds of training between reports that carry no checkpoint; Ray takes in about two a second."""
GROUP_TIMEOUT_S = 600


class RayContext:
    """One rank of a Ray Train worker group."""

    def __init__(self, start: bytes | None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = get_device()
        self._start = start
        self._lines: list[MetricLine] = []
        self._reported_s = 0.0

    def load(self) -> TrainState | None:
        """The newest checkpoint that Ray took; at the start of a resumed run the one of the run folder."""
        newest = ray.train.get_checkpoint()
        if newest is not None:
            with newest.as_directory() as folder:
                return load_state(Path(folder) / CHECKPOINT)
        if self._start is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CHECKPOINT
            path.write_bytes(self._start)
            return load_state(path)

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        self._lines.append(line)
        # Lines are equal on all ranks, their clock included, so all ranks decide alike.
        elapsed = float(line["elapsed_s"])
        if not line["checkpoint"] and 0 <= elapsed - self._reported_s < REPORT_S:
            return
        self._reported_s = elapsed
        metrics = {"lines": json.dumps(self._lines, allow_nan=False) if self.rank == 0 else "[]"}
        self._lines = []
        if state is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder) / CHECKPOINT, state)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    def refuse(self, error: NonFiniteLossError) -> None:
        """Report a refused step, which all ranks refuse alike, as the last word of the run."""
        ray.train.report({"lines": json.dumps(self._lines) if self.rank == 0 else "[]", REFUSED: str(error)})


class RunFolderCallback(UserCallback):
    """In the controller: metric lines and the newest checkpoint into the run folder."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Take one report of all ranks: the checkpoint first, then the lines that lead up to it."""
        if checkpoint is not None:
            with (
                checkpoint.as_directory() as folder,
                open(Path(folder) / CHECKPOINT, "rb") as source,
                atomic_file(self.run_dir / CHECKPOINT) as target,
            ):
                shutil.copyfileobj(source, target)
        lines = [line for rank in metrics for line in json.loads(rank["lines"])]
        if lines:
            # After a restart of the group steps come a second time: the later line stays.
            drop_lines_after(self.run_dir / METRICS, int(lines[0]["global_step"]) - 1)
            append_lines(self.run_dir / METRICS, lines)
        if REFUSED in metrics[0]:
            (self.run_dir / FOLDER / REFUSED).write_text(metrics[0][REFUSED], encoding="utf-8")


def worker(config: dict[str, Any]) -> None:
    """What each worker runs: the same training as the local engine."""
    settings = settings_from_json(config["settings"])
    surroundings = RayContext(config["start"])
    if not settings.run.threads:
        torch.set_num_threads(settings.run.cpus_per_worker)
    try:
        train_in_process(load_inputs(settings, Dataset.open(config["data"])), surroundings, config["kind"])
    except NonFiniteLossError as error:
        # Raised here Ray would start the workers again, to end alike.
        surroundings.refuse(error)


def train_on_ray(
    settings: Settings,
    data: str,
    run_dir: Path,
    *,
    kind: ModelKind,
    resume: bool,
    callbacks: Sequence[UserCallback] = (),
) -> None:
    """Train with Ray Train until the end.

    Args:
        settings: of the run.
        data: URI of the data set.
        run_dir: run folder, on this node.
        kind: what is trained.
        resume: go on from the checkpoint in the folder, if there is one.
        callbacks: that hear of each report after the run folder has it.

    Raises:
        NonFiniteLossError: a step was refused; not tried again, it would end alike.
        RuntimeError: the workers failed more often than `run.max_failures` allows.
    """
    start = None
    if resume and (run_dir / CHECKPOINT).exists():
        start = (run_dir / CHECKPOINT).read_bytes()
        drop_lines_after(run_dir / METRICS, global_step(load_state(run_dir / CHECKPOINT)))
    else:
        (run_dir / METRICS).unlink(missing_ok=True)
    # What Ray kept of an earlier start would be resumed silently; the run folder has all that is needed.
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    with cluster(cluster_address(settings), settings.run.workers * settings.run.cpus_per_worker):
        trainer = TorchTrainer(
            worker,
            train_loop_config={"settings": to_json(settings), "data": data, "kind": kind, "start": start},
            torch_config=TorchConfig(timeout_s=GROUP_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=settings.run.workers,
                use_gpu=settings.run.device != "cpu" and torch.cuda.is_available(),
                resources_per_worker={"CPU": settings.run.cpus_per_worker},
            ),
            run_config=RunConfig(
                name=FOLDER,
                storage_path=str(run_dir),
                failure_config=FailureConfig(max_failures=settings.run.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=[RunFolderCallback(str(run_dir)), *callbacks],
            ),
        )
        try:
            with _interruptible():
                trainer.fit()
        except Exception as error:
            raise _cause(error) from error
    refused = run_dir / FOLDER / REFUSED
    reason = refused.read_text(encoding="utf-8") if refused.exists() else ""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    if reason:
        raise NonFiniteLossError(reason)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt: Ray's own handler, which it leaves behind, ends the process instead."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a trial of a sweep: signals go to the main thread, which is Ray's
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, before)


def _cause(error: Exception) -> Exception:
    """One line with what the first failed worker said."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    return RuntimeError(f"training on Ray failed: {str(first).strip().splitlines()[-1]}; go on with --resume")
