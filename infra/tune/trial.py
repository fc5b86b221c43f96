"""A trial of a sweep: the training of `metagmvae train`, in a worker of Ray Tune, reporting its validations.

Workers stay for the next trial, so a trial costs neither a new process nor opening the data again. All that has to
last is in the trial's run folder; Tune is told only what its scheduler decides by.
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

from metagmvae.configs.load import settings_from_json
from metagmvae.configs.schema import Settings
from metagmvae.infra.runs.folder_lock import lock_run_folder
from metagmvae.infra.runs.local_context import LocalContext
from metagmvae.infra.runs.run_folder import METRICS, SETTINGS, read_lines
from metagmvae.infra.runs.train_in_process import train_in_process
from metagmvae.infra.runs.training_inputs import load_inputs, select_device
from metagmvae.infra.tune.sweep_folder import REASON
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset, MappedRows, Reader
from metagmvae.training.trainer.context import MetricLine, TrainState

PATIENCE_S = 120.0
"""For a process of a sweep that was killed to notice it and let go of the trial."""
LONGEST = 300
"""Characters of a reason."""


class SharedDataset(Dataset):
    """A data set whose rows are opened and compared with their sums once a process, and lie in memory once a node.

    Rows are mapped from the shards, so what was read of them is in the page cache that all processes of a node
    share; a reader that decodes them into memory would hold a copy for each trial.
    """

    def rows(
        self, split: str, reader: Reader = "auto", memory_limit_mb: int = 4096, check: bool = True
    ) -> np.ndarray | MappedRows:
        opened = self.__dict__.setdefault("_opened", {})
        if split not in opened:
            opened[split] = super().rows(split, "mmap", check=True)
        return opened[split]

    def labels(self, split: str) -> np.ndarray:
        known = self.__dict__.setdefault("_labels", {})
        if split not in known:
            known[split] = super().labels(split)
        return known[split]


@lru_cache(maxsize=4)
def shared_dataset(uri: str) -> Dataset:
    """Opened once a process."""
    return SharedDataset.open(uri)


class TrialContext(LocalContext):
    """Of a trial in one process: the run folder as ever, and Tune told of each validation."""

    def __init__(self, run_dir: Path, device: torch.device, task: str) -> None:
        super().__init__(run_dir, device, resume=True)
        self.task = task

    def load(self) -> TrainState | None:
        state = super().load()
        replay_reports(self.run_dir, self.task)
        return state

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        super().report(line, state)
        told = tune_result(line, self.task)
        if told is not None:
            tune.report(told)


class ValidationReports(TuneReportCallback):
    """Of a trial on several workers: runs where the run folder is written, tells Tune of each validation."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        for line in (line for rank in metrics for line in json.loads(rank["lines"])):
            told = tune_result(line, self.task)
            if told is not None:
                super().after_report(run_context, [told], None)


def tune_result(line: MetricLine, task: str) -> dict[str, Any] | None:
    """What Tune is told of a metric line; None where it holds no validation."""
    key = f"validation/{task}"
    if key not in line:
        return None
    return {"step": line["step"], "accuracy": line[key], "ci95": line[f"{key}_ci95"], "seconds": line["elapsed_s"]}


def replay_reports(run_dir: Path, task: str) -> None:
    """Tell a scheduler that is new, as after a resume, what the trial had reached before."""
    for line in read_lines(run_dir / METRICS):
        told = tune_result(line, task)
        if told is not None:
            tune.report(told)


def run_trial(config: dict[str, Any]) -> None:
    """What a worker runs.

    Args:
        config: `folder` of the trial, URI of the `data`, `task`.

    Raises:
        DataError: this node does not see the folder.
    """
    folder = Path(config["folder"])
    if not (folder / SETTINGS).is_file():
        raise DataError(f"{folder}: this node does not see it; give --out a folder that all nodes share")
    try:
        settings = settings_from_json((folder / SETTINGS).read_text(encoding="utf-8"))
        with lock_run_folder(folder, patience_s=PATIENCE_S):
            _train(settings, config["data"], folder, config["task"])
    except Exception as error:  # whatever ends a training is a result of the sweep, which goes on
        with atomic_file(folder / REASON) as file:
            file.write((one_line(error) + "\n").encode())
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(settings: Settings, data: str, folder: Path, task: str) -> None:
    dataset = shared_dataset(data)
    if settings.run.engine == "ray":
        from metagmvae.infra.cluster.train_on_ray import train_on_ray

        replay_reports(folder, task)
        callbacks = [ValidationReports(task)]
        train_on_ray(settings, dataset.uri, folder, kind="meta-gmvae", resume=True, callbacks=callbacks)
        return
    if not settings.run.threads:
        torch.set_num_threads(settings.run.cpus_per_worker)
    context = TrialContext(folder, select_device(settings), task)
    train_in_process(load_inputs(settings, dataset), context, "meta-gmvae")


def one_line(error: BaseException) -> str:
    """What an error says, with its type where it is none of ours."""
    ours = type(error).__module__.split(".")[0] in ("configs", "pipelines", "training", "evaluation", "infra")
    text = " ".join(str(error).split())
    return (text if ours else f"{type(error).__name__}: {text}")[:LONGEST]
