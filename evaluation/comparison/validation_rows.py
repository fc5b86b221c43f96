"""What can be compared, and validations in training as rows of it: of runs, of trials and of registered versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, RowKind, Score, decisive_settings


@dataclass(frozen=True)
class ComparedItem:
    """One thing to compare: its rows, and its training curve where that is known."""

    ref: str
    name: str
    rows: tuple[Row, ...]
    lines: tuple[Mapping[str, Any], ...] = ()
    """Metric lines of its training."""
    judgeable: bool = False
    """A model that can be judged now."""
    identity: str = ""
    """The same for two references to one thing."""
    listed: bool = False
    """One of several by one reference: left out, not refused, where nothing is known of it."""


def newest_validation(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last metric line that a model was judged in."""
    return next((line for line in reversed(lines) if any(key.startswith("validation/") for key in line)), None)


def validation_row(
    name: str, kind: RowKind, ref: str, settings: Settings, line: Mapping[str, Any], mode: str, data: str | None
) -> Row:
    """A validation in training as a row; `data` is the fingerprint of what was trained and judged on."""
    scores = {}
    for key, value in line.items():
        task = task_of(key.removeprefix("validation/")) if key.startswith("validation/") else None
        if task is not None:
            scores[task] = Score(value, line.get(f"{key}_ci95"))
    # Metric lines count the steps of all stages.
    steps = max(line["global_step"] - settings.pretrain.steps, 0)
    protocol = validation_protocol(settings, mode, data)
    return Row(name, kind, ref, protocol, scores, line["elapsed_s"], steps, compared_settings(settings, data))


def validation_protocol(settings: Settings, mode: str, data: str | None) -> EvalProtocol:
    """How validation in training judges."""
    wanted = settings.validation
    return EvalProtocol(mode, settings.data.validation_split, data, wanted.query, wanted.episodes, wanted.seed)


def compared_settings(settings: Settings, trained_on: str | None) -> dict[str, Any]:
    """By dotted name, with the fingerprint of the training data."""
    return decisive_settings(settings.model_dump(mode="json")) | ({"trained_on": trained_on} if trained_on else {})


def task_of(name: str) -> tuple[int, int] | None:
    """(way, shot) of `5w1s`; None of anything else."""
    way, _, shot = name.removesuffix("s").partition("w")
    return (int(way), int(shot)) if name.endswith("s") and way.isdigit() and shot.isdigit() else None
