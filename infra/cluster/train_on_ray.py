"""Training with Ray Train: data parallel over any number of workers; lost workers are replaced.

The run folder holds the complete state, as with the local engine. Rank 0 reports metric lines and checkpoints, and a
callback in Ray's controller, which runs on the driver's node, writes them into the run folder. If a worker is lost,
Ray restarts all workers from the last reported checkpoint. If the driver is lost, `--resume` starts a new Ray run
from the checkpoint in the run folder; nothing that Ray stored for the old run is needed.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metagmvae.configs.credentials import with_credentials
from metagmvae.configs.load import SettingsError, to_json
from metagmvae.configs.schema import Settings
from metagmvae.infra.cluster.connect import cluster, gpu_count
from metagmvae.infra.cluster.stop_flag import StopFlag
from metagmvae.infra.cluster.train_worker import NON_FINITE, STOPPED, train_worker
from metagmvae.infra.cluster.watch import watched_resources
from metagmvae.infra.cluster.worker_failures import failure_reason
from metagmvae.infra.runs.run_folder import CHECKPOINT, METRICS, RAY_FOLDER, append_lines, drop_lines_after, global_step
from metagmvae.infra.runs.stop_signals import deferred_signals
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import WorkError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.trainer.checkpoint import load_state
from metagmvae.training.trainer.stages import ModelKind
from metagmvae.training.trainer.update import NonFiniteLossError

GRACE_S = 20.0
"""Longest wait for the workers' checkpoint after a signal; Kubernetes and Slurm kill a process after 30 s."""
SETTLE_S = 15.0
"""Longest wait for the end of Ray's training after that checkpoint."""
GROUP_TIMEOUT_S = 600
"""For collective operations of torch.distributed."""


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
        if STOPPED in metrics[0]:
            (self.run_dir / RAY_FOLDER / STOPPED).touch()
        if NON_FINITE in metrics[0]:
            (self.run_dir / RAY_FOLDER / NON_FINITE).write_text(metrics[0][NON_FINITE], encoding="utf-8")


class LeanTrainer(TorchTrainer):
    """Ray Train without the processes that this training does not need, each of which imports Ray for seconds.

    One of them holds Ray datasets. The other, the cleaner of placement groups, asks Ray's dashboard; without one, each
    training would wait 12 s for it at its end. Ray itself frees the workers when the driver ends. Only a trial needs
    the cleaner: it is stopped while the driver of its sweep goes on.
    """

    def __init__(self, *arguments: Any, is_trial: bool, **options: Any) -> None:
        self.unused = {"DatasetsCallback"} if is_trial else {"DatasetsCallback", "PlacementGroupCleanerCallback"}
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[Any]:
        return [item for item in super()._create_default_callbacks() if type(item).__name__ not in self.unused]


@contextmanager
def training_cluster(settings: Settings, *, dry_run: bool = False) -> Iterator[None]:
    """Connect to the Ray cluster of a training, see `cluster`, and check that it has the CPUs and GPUs for it.

    Raises:
        SettingsError: the cluster cannot be reached, or has too few CPUs or GPUs.
    """
    cpus = settings.run.workers * settings.run.cpus_per_worker
    with cluster(settings.run.address, cpus, dry_run=dry_run):
        gpus = {"GPU": settings.run.workers} if _use_gpu(settings) else {}
        with nullcontext() if dry_run else watched_resources({"CPU": cpus} | gpus):
            yield


def train_on_ray(
    settings: Settings,
    dataset: Dataset,
    run_dir: Path,
    *,
    kind: ModelKind,
    resume: bool,
    callbacks: Sequence[UserCallback] = (),
) -> None:
    """Train with Ray Train until the last step.

    Args:
        settings: settings of the run.
        dataset: its URI must be readable on every node.
        run_dir: run folder, on this node.
        kind: what is trained, the whole model or an encoder only.
        resume: continue from the checkpoint in the folder, if it has one.
        callbacks: called after each report has been written into the run folder.

    Raises:
        SettingsError: the cluster cannot be reached, or has too few CPUs or GPUs.
        NonFiniteLossError: a step had a loss that is not finite; it is not tried again.
        WorkError: the workers failed more often than `run.max_failures` allows.
        KeyboardInterrupt: a signal stopped the training, and the workers have saved the step that they were at.
    """
    checkpoint = None
    if resume and (run_dir / CHECKPOINT).exists():
        checkpoint = (run_dir / CHECKPOINT).read_bytes()
        drop_lines_after(run_dir / METRICS, global_step(load_state(run_dir / CHECKPOINT)))
    else:
        (run_dir / METRICS).unlink(missing_ok=True)
    # Ray would silently resume from files of an earlier start; the run folder has everything that is needed.
    shutil.rmtree(run_dir / RAY_FOLDER, ignore_errors=True)
    data = {"data": with_credentials(dataset.uri), "fingerprint": dataset.fingerprint}
    config = {"settings": to_json(settings), "kind": kind, "checkpoint": checkpoint, **data}
    with training_cluster(settings):
        stop_flag = new_stop_flag() if threading.current_thread() is threading.main_thread() else None
        trainer = _trainer(settings, config | {"stop_flag": stop_flag}, run_dir, callbacks)
        try:
            if stop_flag is None:
                trainer.fit()  # a trial of a sweep: signals are handled by the main thread of Ray's worker
            else:
                _fit_until_signal(trainer, stop_flag, run_dir / RAY_FOLDER / STOPPED)
        except Exception as error:
            raise _one_line_error(error, run_dir) from error
        else:
            message = run_dir / RAY_FOLDER / NON_FINITE
            if message.exists():
                raise NonFiniteLossError(message.read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(run_dir / RAY_FOLDER, ignore_errors=True)


def new_stop_flag() -> Any:
    """A handle of `StopFlag` on the driver's node, so that it is not lost with another node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(StopFlag).remote()


def _trainer(
    settings: Settings, config: dict[str, Any], run_dir: Path, callbacks: Sequence[UserCallback]
) -> TorchTrainer:
    return LeanTrainer(
        train_worker,
        is_trial=config["stop_flag"] is None,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=settings.run.workers,
            use_gpu=_use_gpu(settings),
            resources_per_worker={"CPU": settings.run.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
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
    run, gpus = settings.run, gpu_count()
    if run.device == "cpu" or (run.device == "auto" and not gpus):
        return False
    if gpus < run.workers:
        raise SettingsError(
            f"run.workers is {run.workers}, but the Ray cluster has {gpus} GPUs: use fewer workers, or set "
            'run.device to "cpu"'
        )
    return True


def _fit_until_signal(trainer: TorchTrainer, stop_flag: Any, stopped: Path) -> None:
    """Run the trainer in a thread, so that Ctrl-C and SIGTERM are handled here and not by Ray.

    Args:
        trainer: to run.
        stop_flag: tells the workers about a signal.
        stopped: file that exists when the checkpoint of the stopped workers is in the run folder.

    Raises:
        KeyboardInterrupt, Terminated: there was a signal. The workers have saved their step, unless they train no step
            yet, or need longer than `GRACE_S`.
    """
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with deferred_signals() as requested:
        thread.start()
        while thread.is_alive() and not requested():
            thread.join(0.1)
        if requested():
            deadline = time.monotonic() + GRACE_S
            if ray.get(stop_flag.request.remote(), timeout=GRACE_S):
                while thread.is_alive() and not stopped.exists() and time.monotonic() < deadline:
                    thread.join(0.1)
                # `ray.shutdown` while the thread asks Ray for the result can end this process with exit code 1.
                thread.join(min(SETTLE_S, max(0.0, deadline - time.monotonic())))
    if errors:
        raise errors[0]


def _one_line_error(error: Exception, run_dir: Path) -> Exception:
    """An error with the reason of the first worker that failed."""
    failures = getattr(error, "worker_failures", None) or {}
    reason = failure_reason(next(iter(failures.values()), error))
    remedy = "; continue with --resume" if (run_dir / METRICS).exists() else ""
    return WorkError(f"training on Ray failed: {reason}{remedy}")
