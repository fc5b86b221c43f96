"""A run folder: the names of its files, and reading and writing of metric lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from metagmvae.configs.load import SettingsError, settings_from_json
from metagmvae.configs.schema import Settings
from metagmvae.pipelines.files import (
    atomic_file,
    check_document,
    parse_json,
    read_json,
    read_text,
    remove_temporary_files,
)
from metagmvae.pipelines.records import DataError, WorkError
from metagmvae.training.models.posterior_calibration import CALIBRATION as CALIBRATION
from metagmvae.training.trainer.checkpoint import CHECKPOINT as CHECKPOINT
from metagmvae.training.trainer.context import MetricLine, TrainState

METRICS = "metrics.jsonl"
"""One JSON object per logged training step."""
SETTINGS = "settings.json"
CONFIG = "config.toml"
"""The settings again, as a file that a user can read and train from."""
RECORD = "run.json"
"""Command line, commit, versions, machine and fingerprints of the run."""
STATUS = "status.json"
EVALUATIONS = "evaluations.jsonl"
"""One JSON object per `metagmvae evaluate` of the run."""
SYSTEM = "system.jsonl"
"""One JSON object per sample of the machine: CPU, memory, GPU."""
CURSOR = "tracking.json"
"""How far the run has been uploaded to MLflow."""
RESULTS = "results"
"""Folder of evaluation results: JSON files and accuracies per episode as Parquet."""
FIGURES = "figures"
"""Folder of PNG files."""
RAY_FOLDER = ".ray"
"""Ray's own files, deleted at the end; nothing in it is needed."""
TRAINING_LOCK = ".training.lock"
TRACKING_LOCK = ".tracking.lock"
REGISTERING_LOCK = ".registering.lock"
WRITTEN = (SETTINGS, CONFIG, RECORD, STATUS, CHECKPOINT, CALIBRATION, METRICS, CURSOR)
"""Files that are replaced as a whole. A process that is killed meanwhile leaves a temporary file `.NAME.…`."""
MAX_LINES_BYTES = 2**30
LINE_REMEDY = "correct the line or delete it"

Count = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def global_step(state: TrainState) -> int:
    """Return the number of steps done over all stages."""
    pretrain = settings_from_json(state["settings"]).pretrain.steps
    return state["step"] if state["stage"] == "pretrain" else pretrain + state["step"]


def append_lines(path: Path, lines: list[MetricLine]) -> None:
    """Append metric lines.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
        WorkError: the disk is full, or the file cannot be written.
    """
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> WorkError:
    """The error of a training that cannot write a file of its run folder."""
    return WorkError(f"{path}: cannot be written ({error.strerror}); mend this and continue with --resume")


class _MetricLine(BaseModel, strict=True, extra="allow"):
    """The keys of a line of `metrics.jsonl` that this program reads; all others are numbers or words."""

    __pydantic_extra__: dict[str, float | bool | str | None]

    @model_validator(mode="after")
    def _check_accuracies(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if key.startswith("validation/") and (isinstance(value, bool) or not isinstance(value, float | int)):
                raise ValueError(f"{key} = {value!r}: must be a number")
        if self.loss is None and self.step:
            raise ValueError("loss is missing")
        return self

    stage: str
    step: Count
    global_step: Count
    loss: float | None = None
    """None at step 0 of a method that is not meta-trained."""
    elapsed_s: Seconds
    steps: Count = 0
    images_per_s: float = 0.0


class _Record(BaseModel, strict=True):
    """The keys of `run.json` that this program reads; those of later versions are missing in older files."""

    data: str | None = None
    data_fingerprint: str | None = None
    kind: str | None = None


def read_lines(path: Path) -> list[MetricLine]:
    """Return the lines of `metrics.jsonl` or `system.jsonl`, without a last line that a killed process left incomplete.

    Raises:
        DataError: a complete line is not JSON, or lacks a key.
    """
    if not path.exists():
        return []
    content = read_text(path, MAX_LINES_BYTES)
    lines: list[MetricLine] = []
    for number, text in enumerate(content[: content.rfind("\n") + 1].split("\n")[:-1], 1):
        where = f"{path} line {number}"
        line = parse_json(text, where)
        if path.name == METRICS:
            check_document(_MetricLine, line, where, LINE_REMEDY)
        elif not isinstance(line, dict):
            raise DataError(f"{where}: not a JSON object; {LINE_REMEDY}")
        lines.append(line)
    return lines


def read_settings(run_dir: Path) -> Settings:
    """Return the settings of a run.

    Raises:
        DataError: `settings.json` is missing or cannot be read.
        SettingsError: it contains no valid settings.
    """
    path = run_dir / SETTINGS
    try:
        return settings_from_json(read_text(path))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def read_record(run_dir: Path) -> dict[str, Any]:
    """Return the record of a run, `run.json`; empty if there is none.

    Raises:
        DataError: it is not such a record.
    """
    path = run_dir / RECORD
    if not path.exists():
        return {}
    record: dict[str, Any] = read_json(path)
    check_document(_Record, record, path, "delete the file, or restore it")
    return record


def folder_contents(run_dir: Path) -> set[str]:
    """Return the names in a run folder, without lock files and what a killed process left of a file being written."""
    if not run_dir.is_dir():
        return set()
    names = {path.name for path in run_dir.iterdir()} - {TRAINING_LOCK, TRACKING_LOCK, REGISTERING_LOCK, RAY_FOLDER}
    return {name for name in names if not name.startswith(tuple(f".{written}." for written in WRITTEN))}


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left of files that it was writing. The caller holds the lock of the folder."""
    for name in WRITTEN:
        remove_temporary_files(run_dir, name)


def clear_run_folder(run_dir: Path) -> None:
    """Delete what a training writes before its first step. The folder and its lock, which is held, remain."""
    for name in (SETTINGS, CONFIG, RECORD, STATUS, METRICS, SYSTEM, CURSOR):
        (run_dir / name).unlink(missing_ok=True)
    remove_leftovers(run_dir)


def drop_lines_after(path: Path, step: int) -> None:
    """Delete the metric lines after a global step: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if int(line["global_step"]) <= step]
    with atomic_file(path) as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in kept)


def is_finished(path: Path) -> bool:
    """Return whether the last metric line is that of the last step of the last stage."""
    last = (read_lines(path) or [{}])[-1]
    return last.get("stage") == "meta" and last["step"] == last.get("steps")
