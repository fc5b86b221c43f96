"""The files of a run folder: their names, and metric lines read and written."""

from __future__ import annotations

import json
from pathlib import Path

from metagmvae.training.trainer.context import MetricLine, TrainState

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
RECORD = "run.json"
CURSOR = "tracking.json"
STATUS = "status.json"
TRACKING_LOCK = ".tracking.lock"
EVALUATIONS = "evaluations.jsonl"


def global_step(state: TrainState) -> int:
    """Steps done over all stages."""
    pretrain = json.loads(state["settings"])["pretrain"]["steps"]
    return state["step"] if state["stage"] == "pretrain" else pretrain + state["step"]


def append_lines(path: Path, lines: list[MetricLine]) -> None:
    """Add metric lines; numbers that JSON does not know (NaN) are refused."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def read_lines(path: Path) -> list[MetricLine]:
    """Whole metric lines of a run; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to a global step: what a resumed run is going to write again goes."""
    kept = [line for line in read_lines(path) if int(line["global_step"]) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    if path.exists():
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)


def finished(path: Path) -> bool:
    """Whether the last metric line is that of the last step of the last stage."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    return bool(last) and last.get("stage") == "meta" and last.get("step") == last.get("steps")
