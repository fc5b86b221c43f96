"""One trial of a sweep: the same training as `metagmvae train`, in a Ray Tune worker that reports each validation.

Workers are reused for the next trial, so a trial starts no new process and does not open the dataset again. All
persistent data is in the trial's run folder. Tune receives only the values that its scheduler needs.
"""

from __future__ import annotations

import gc
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from metagmvae.configs.schema import Settings
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import METRICS, SETTINGS, read_lines, read_settings, remove_leftovers
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import load_inputs, select_device
from metagmvae.infra.tune.sweep_folder import REASON
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.blocks import MappedRows
from metagmvae.pipelines.shards.dataset import Dataset, Reader
from metagmvae.pipelines.shards.encoded import EncodedRows
from metagmvae.pipelines.shards.manifest import check_node_copy
from metagmvae.training.trainer.context import MetricLine, TrainState

PATIENCE_S = 120.0
"""Longest wait for the process of a killed sweep to release the trial's folder."""
MAX_REASON = 300
"""Characters of a failure reason."""
OUTSIDE = "outside"
"""Key of a report to Tune: an error that no settings of a trial have caused, such as a full disk."""
NOT_WRITTEN = "cannot be written ("
"""In each message about a full disk or a missing right. Of a worker of a distributed trial only the text arrives."""


class SharedDataset(Dataset):
    """A dataset whose rows are opened and verified once per process and are in memory once per node.

    Rows are memory-mapped from the shards, so all processes of a node share them in the page cache. A reader that
    decodes them into memory would hold one copy per trial.
    """

    def rows(
        self, split: str, reader: Reader = "auto", memory_limit_mb: int = 4096, check: bool = True
    ) -> np.ndarray | MappedRows | EncodedRows:
        """Memory-mapped rows of a split, whatever the reader."""
        opened = self.__dict__.setdefault("_opened", {})
        if split not in opened:
            opened[split] = super().rows(split, "mmap", check=True)
        return opened[split]

    def labels(self, split: str) -> np.ndarray:
        """Class ids of a split, read once."""
        labels = self.__dict__.setdefault("_labels", {})
        if split not in labels:
            labels[split] = super().labels(split)
        return labels[split]


@lru_cache(maxsize=4)
def shared_dataset(uri: str) -> Dataset:
    """Open a dataset once per process."""
    return SharedDataset.open(uri)


class TrialContext(LocalContext):
    """Context of a trial in one process: writes the run folder and reports each validation to Tune."""

    def __init__(self, run_dir: Path, device: torch.device, task: str) -> None:
        super().__init__(run_dir, device, resume=True)
        self.task = task

    def load(self) -> TrainState | None:
        """Load the checkpoint and repeat the reports before it."""
        state = super().load()
        replay_reports(self.run_dir, self.task)
        return state

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        """Write a metric line, and report its validation if it has one."""
        super().report(line, state)
        result = tune_result(line or {}, self.task)
        if result is not None:
            tune.report(result)


class ValidationReports(TuneReportCallback):
    """Reports each validation of a distributed trial to Tune. Runs in the process that writes the run folder."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Report the validations among the metric lines of all ranks."""
        for line in (line for rank in metrics for line in json.loads(rank["lines"])):
            result = tune_result(line, self.task)
            if result is not None:
                super().after_report(run_context, [result], None)


def tune_result(line: MetricLine, task: str) -> dict[str, Any] | None:
    """Values of a metric line that are reported to Tune; None if it contains no validation."""
    key = f"validation/{task}"
    if key not in line:
        return None
    return {"step": line["step"], "accuracy": line[key], "ci95": line.get(f"{key}_ci95"), "seconds": line["elapsed_s"]}


def replay_reports(run_dir: Path, task: str) -> None:
    """Report the trial's earlier validations again. After a resume the scheduler is new and does not know them."""
    for line in read_lines(run_dir / METRICS):
        result = tune_result(line, task)
        if result is not None:
            tune.report(result)


def run_trial(config: dict[str, Any]) -> None:
    """Run a trial in a worker. An error of the training is written into its folder as the reason of its failure.

    An error of the dataset or of files is reported to Tune: it ends the sweep, and a resume continues the trial.

    Args:
        config: `folder` of the trial, URI of the `data` and their `fingerprint`, `task`.

    Raises:
        DataError: the trial's folder does not exist on this node.
    """
    folder = Path(config["folder"])
    if not (folder / SETTINGS).is_file():
        raise DataError(f"{folder}: this node does not see it; give --out a folder that all nodes share")
    try:
        settings = read_settings(folder)
        with lock_run_folder(folder, patience_s=PATIENCE_S):
            remove_leftovers(folder)
            dataset = shared_dataset(config["data"])
            check_node_copy(config["data"], dataset.fingerprint, config["fingerprint"])
            _train_or_say_why(settings, dataset, folder, config["task"])
    except Exception as error:
        tune.report({OUTSIDE: one_line(error)})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train_or_say_why(settings: Settings, dataset: Dataset, folder: Path, task: str) -> None:
    """Train; write the reason of a failure that the settings of the trial have caused."""
    try:
        _train(settings, dataset, folder, task)
    except Exception as error:
        if _is_outside(error):
            raise
        with atomic_file(folder / REASON) as file:
            file.write((one_line(error) + "\n").encode())


def _is_outside(error: Exception) -> bool:
    """Whether the operating system or the object store has caused an error, and not the settings of the trial."""
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError) or NOT_WRITTEN in str(error)


def _train(settings: Settings, dataset: Dataset, folder: Path, task: str) -> None:
    if settings.run.engine == "ray":
        from metagmvae.infra.cluster.train_on_ray import train_on_ray

        replay_reports(folder, task)
        callbacks = [ValidationReports(task)]
        train_on_ray(settings, dataset, folder, kind="learner", resume=True, callbacks=callbacks)
        return
    if not settings.run.threads:
        torch.set_num_threads(settings.run.cpus_per_worker)
    context = TrialContext(folder, select_device(settings), task)
    train_in_process(load_inputs(settings, dataset), context, "learner")


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with its type unless this project raised it."""
    message = " ".join(str(error).split())
    is_ours = type(error).__module__.split(".")[0] == "metagmvae"
    return (message if is_ours else f"{type(error).__name__}: {message}")[:MAX_REASON]
