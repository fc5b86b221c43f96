"""What a sweep leaves behind of each trial: one line of JSON in `trials.jsonl` of the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from metagmvae.pipelines.records import DataError

TRIALS = "trials.jsonl"
Value = bool | int | float | str
Status = Literal["finished", "stopped", "failed", "refused"]
"""Trained to the end; stopped early by the scheduler; failed in training (the reason says how); an impossible
combination that took no slot."""


class CurvePoint(BaseModel):
    """One validation of a trial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    accuracy: float
    """A share in [0, 1]."""
    ci95: float
    seconds: float
    """Trained until then."""


class Trial(BaseModel):
    """One trial that has ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    """From 0, in the order in which the search proposed them."""
    settings: dict[str, Value]
    """The settings that the sweep varies, by dotted name."""
    status: Status
    reason: str = ""
    """One line, where it failed or was refused."""
    curve: tuple[CurvePoint, ...] = ()
    """Its validations, by rising step."""
    seconds: float = 0.0
    """From its start to its end, everything counted."""
    run_id: str = ""
    """Its run in MLflow."""

    @property
    def last(self) -> CurvePoint | None:
        """Its newest validation, which it is judged by."""
        return self.curve[-1] if self.curve else None


def read_trials(path: Path) -> list[Trial]:
    """Trials of a sweep in the order in which they ended; the last line of each number counts.

    A last line without its end is still being written, or was cut off by a kill, and is left out.

    Raises:
        DataError: a line is not a trial.
    """
    found: dict[int, Trial] = {}
    # Not splitlines(): a reason may hold characters that it takes for the end of a line.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            trial = Trial.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}, line {number}: not a trial ({error.errors()[0]['msg']})") from error
        found.pop(trial.number, None)
        found[trial.number] = trial
    return list(found.values())


def lines_of(trials: Iterable[Trial]) -> str:
    """The lines that `read_trials` reads."""
    return "".join(json.dumps(trial.model_dump(mode="json"), ensure_ascii=False) + "\n" for trial in trials)
