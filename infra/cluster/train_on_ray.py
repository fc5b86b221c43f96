"""Training with Ray Train: data parallel over any number of workers; lost workers are replaced.

The run folder holds the complete state, as with the local engine. Rank 0 reports metric lines and checkpoints, and a
callback in Ray's controller, which runs on the driver's node, writes them into the run folder. If a worker is lost,
Ray restarts all workers from the last reported checkpoint. If the driver is lost, `--resume` starts a new Ray run
from the checkpoint in the run folder; nothing that Ray stored for the old run is needed.
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

from metagmvae.configs.credentials import with_credentials
from metagmvae.configs.load import SettingsError, settings_from_json, to_json
from metagmvae.configs.schema import Settings
from metagmvae.infra.cluster.connect import cluster
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS, append_lines, drop_lines_after, global_step
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import WorkError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, TrainState
from metagmvae.training.trainer.stages import ModelKind
from metagmvae.training.trainer.update import NonFiniteLossError

FOLDER = "ray"
"""Ray's own files in the run folder, deleted at the end."""
NON_FINITE = "non-finite"
"""Key of a report, and name of a file in `FOLDER`, with the message of a loss that is not finite."""
REPORT_INTERVAL_S = 2.0
"""Seconds of training between reports without a checkpoint; Ray processes about two reports per second."""
GROUP_TIMEOUT_S = 600
"""For collective operations of torch.distributed."""


class RayContext:
    """One rank of a Ray Train worker group."""

    def __init__(self, initial_checkpoint: bytes | None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = get_device()
        self._initial_checkpoint = initial_checkpoint
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

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        """Report to Ray: every line with a checkpoint, other lines collected for `REPORT_INTERVAL_S`."""
        self._lines.append(line)
        # The lines, including `elapsed_s`, are equal on all ranks, so all ranks report at the same steps.
        elapsed = float(line["elapsed_s"])
        if not line["checkpoint"] and 0 <= elapsed - self._reported_s < REPORT_INTERVAL_S:
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

    def report_non_finite(self, error: NonFiniteLossError) -> None:
        """Report a loss that is not finite, which all ranks find at the same step, as the last report of the run."""
        ray.train.report({"lines": json.dumps(self._lines) if self.rank == 0 else "[]", NON_FINITE: str(error)})


class RunFolderCallback(UserCallback):
    """Writes metric lines and checkpoints into the run folder; runs in Ray's controller."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Write one report of all ranks: first the checkpoint, then the metric lines up to it."""
        if checkpoint is not None:
            with (
                checkpoint.as_directory() as folder,
                open(Path(folder) / CHECKPOINT, "rb") as source,
                atomic_file(self.run_dir / CHECKPOINT) as target,
            ):
                shutil.copyfileobj(source, target)
        lines = [line for rank in metrics for line in json.loads(rank["lines"])]
        if lines:
            # After a restart of the workers some steps are reported again; the later line is kept.
            drop_lines_after(self.run_dir / METRICS, int(lines[0]["global_step"]) - 1)
            append_lines(self.run_dir / METRICS, lines)
        if NON_FINITE in metrics[0]:
            (self.run_dir / FOLDER / NON_FINITE).write_text(metrics[0][NON_FINITE], encoding="utf-8")


def train_worker(config: dict[str, Any]) -> None:
    """Run the training of one worker; the same as that of the local engine.

    Args:
        config: `settings` as JSON, URI of the `data`, `kind`, and `checkpoint` of the run folder or None.
    """
    settings = settings_from_json(config["settings"])
    context = RayContext(config["checkpoint"])
    if not settings.run.threads:
        torch.set_num_threads(settings.run.cpus_per_worker)
    try:
        train_in_process(load_inputs(settings, Dataset.open(config["data"])), context, config["kind"])
    except NonFiniteLossError as error:
        # Not raised: Ray would restart the workers, with the same result.
        context.report_non_finite(error)


def train_on_ray(
    settings: Settings,
    data: str,
    run_dir: Path,
    *,
    kind: ModelKind,
    resume: bool,
    callbacks: Sequence[UserCallback] = (),
) -> None:
    """Train with Ray Train until the last step.

    Args:
        settings: settings of the run.
        data: URI of the dataset, readable on every node.
        run_dir: run folder, on this node.
        kind: what is trained, the whole model or an encoder only.
        resume: continue from the checkpoint in the folder, if it has one.
        callbacks: called after each report has been written into the run folder.

    Raises:
        SettingsError: the cluster cannot be reached, or has too few CPUs or GPUs.
        NonFiniteLossError: a step had a loss that is not finite; it is not tried again.
        WorkError: the workers failed more often than `run.max_failures` allows.
    """
    checkpoint = None
    if resume and (run_dir / CHECKPOINT).exists():
        checkpoint = (run_dir / CHECKPOINT).read_bytes()
        drop_lines_after(run_dir / METRICS, global_step(load_state(run_dir / CHECKPOINT)))
    else:
        (run_dir / METRICS).unlink(missing_ok=True)
    # Ray would silently resume from files of an earlier start; the run folder has everything that is needed.
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    config = {"settings": to_json(settings), "data": with_credentials(data), "kind": kind, "checkpoint": checkpoint}
    with cluster(settings.run.address, settings.run.workers * settings.run.cpus_per_worker):
        trainer = _trainer(settings, config, run_dir, callbacks)
        try:
            with _keyboard_interrupt():
                trainer.fit()
        except Exception as error:
            raise _one_line_error(error) from error
    message_file = run_dir / FOLDER / NON_FINITE
    message = message_file.read_text(encoding="utf-8") if message_file.exists() else ""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    if message:
        raise NonFiniteLossError(message)


def _trainer(
    settings: Settings, config: dict[str, Any], run_dir: Path, callbacks: Sequence[UserCallback]
) -> TorchTrainer:
    return TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=settings.run.workers,
            use_gpu=_use_gpu(settings),
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


def _use_gpu(settings: Settings) -> bool:
    """Return whether each worker gets a GPU: of the cluster, since the driver's node may have none.

    Raises:
        SettingsError: the cluster has fewer GPUs than workers, but at least one, or `run.device` asks for GPUs.
    """
    run, gpus = settings.run, int(ray.cluster_resources().get("GPU", 0))
    if run.device == "cpu" or (run.device == "auto" and not gpus):
        return False
    if gpus < run.workers:
        raise SettingsError(
            f"run.workers is {run.workers}, but the Ray cluster has {gpus} GPUs: use fewer workers, or set "
            'run.device to "cpu"'
        )
    return True


@contextmanager
def _keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C; Ray installs a handler that ends the process, and does not remove it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a trial of a sweep: signals are handled by the main thread of Ray's worker
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, handler)


def _one_line_error(error: Exception) -> Exception:
    """An error with the last line of the message of the first worker that failed."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    return WorkError(f"training on Ray failed: {str(first).strip().splitlines()[-1]}; continue with --resume")
