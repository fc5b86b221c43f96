"""The local engine's surroundings: one process, files in a run folder. Needs neither Ray nor MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from training.checkpoint import load_state, save_state
from training.hooks import Line, State

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


class LocalSurroundings:
    """Rank 0 of 1. Checkpoints are replaced atomically, metric lines appended as they come."""

    rank = 0
    world = 1

    def __init__(self, run_dir: Path, device: torch.device, *, resume: bool) -> None:
        self.run_dir = run_dir
        self.device = device
        self.resume = resume

    def load(self) -> State | None:
        path = self.run_dir / CHECKPOINT
        if not (self.resume and path.exists()):
            drop_lines_after(self.run_dir / METRICS, 0)
            return None
        state = load_state(path)
        drop_lines_after(self.run_dir / METRICS, global_step(state))
        return state

    def report(self, line: Line, state: State | None) -> None:
        # The checkpoint first: a line is never about a step that a resumed run would do again.
        if state is not None:
            save_state(self.run_dir / CHECKPOINT, state)
        append_lines(self.run_dir / METRICS, [line])


def global_step(state: State) -> int:
    """Steps done over all stages."""
    pretrain = json.loads(state["settings"])["pretrain"]["steps"]
    return state["step"] if state["stage"] == "pretrain" else pretrain + state["step"]


def append_lines(path: Path, lines: list[Line]) -> None:
    """Add metric lines; numbers that JSON does not know (NaN) are refused."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def read_lines(path: Path) -> list[Line]:
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
