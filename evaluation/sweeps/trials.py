"""The trials of a sweep: one line of JSON per ended trial in `trials.jsonl` of the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from metagmvae.configs.dimensions import Value
from metagmvae.pipelines.files import read_text
from metagmvae.pipelines.records import DataError

TRIALS = "trials.jsonl"
Status = Literal["finished", "stopped", "failed", "refused"]
"""finished: trained to the last step; stopped: ended early by the scheduler or the time limit; failed: training raised
an error; refused: the combination of settings is impossible, nothing was trained."""


class CurvePoint(BaseModel, frozen=True, extra="forbid"):
    """One validation of a trial."""

    step: int
    accuracy: float
    """Fraction in [0, 1]."""
    ci95: float | None
    """Half-width of the 95% confidence interval over episodes; None for a single episode."""
    seconds: float
    """Training time up to this step."""


class Trial(BaseModel, frozen=True, extra="forbid"):
    """One trial that has ended."""

    number: int
    """From 0, in the order in which the search proposed them."""
    settings: dict[str, Value]
    """Values of the settings that the sweep varies, by dotted key."""
    status: Status
    reason: str = ""
    """Why the trial failed, was refused or was stopped by the time limit, in one line."""
    curve: tuple[CurvePoint, ...] = ()
    """Validations in order of increasing step."""
    seconds: float = 0.0
    """Wall time from start to end, including everything besides training."""
    run_id: str = ""
    """ID of the trial's run in MLflow."""

    @property
    def last(self) -> CurvePoint | None:
        """The latest validation; trials are ranked by its accuracy."""
        return self.curve[-1] if self.curve else None


def read_trials(path: Path) -> list[Trial]:
    """Read the trials of a sweep in the order in which they ended. Of several lines with one number the last counts.

    A last line without a line break is ignored: it is being written, or the process was killed while writing it.

    Raises:
        DataError: a line is not a trial.
    """
    trials: dict[int, Trial] = {}
    # str.splitlines would also split at other characters, which a reason may contain.
    lines = read_text(path).split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            trial = Trial.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}, line {number}: not a trial ({error.errors()[0]['msg']})") from error
        trials.pop(trial.number, None)
        trials[trial.number] = trial
    return list(trials.values())


def to_json_lines(trials: Iterable[Trial]) -> str:
    """Format trials as the lines that `read_trials` reads."""
    return "".join(json.dumps(trial.model_dump(mode="json"), ensure_ascii=False) + "\n" for trial in trials)
