"""A run folder: the names of its files, and reading and writing of metric lines."""

from __future__ import annotations

import json
from pathlib import Path

from metagmvae.pipelines.files import atomic_file
from metagmvae.training.trainer.checkpoint import CHECKPOINT as CHECKPOINT
from metagmvae.training.trainer.context import MetricLine, TrainState

METRICS = "metrics.jsonl"
"""One JSON object per logged training step."""
SETTINGS = "settings.json"
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
TRAINING_LOCK = ".training.lock"
TRACKING_LOCK = ".tracking.lock"


def global_step(state: TrainState) -> int:
    """Return the number of steps done over all stages."""
    pretrain = json.loads(state["settings"])["pretrain"]["steps"]
    return state["step"] if state["stage"] == "pretrain" else pretrain + state["step"]


def append_lines(path: Path, lines: list[MetricLine]) -> None:
    """Append metric lines.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def read_lines(path: Path) -> list[MetricLine]:
    """Return the metric lines of a run, without a last line that a killed process left incomplete."""
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


def drop_lines_after(path: Path, step: int) -> None:
    """Delete the metric lines after a global step: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if int(line["global_step"]) <= step]
    with atomic_file(path) as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in kept)


def is_finished(path: Path) -> bool:
    """Return whether the last metric line is that of the last step of the last stage."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    return bool(last) and last.get("stage") == "meta" and last.get("step") == last.get("steps")
