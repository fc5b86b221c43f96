"""Items of a comparison, and rows made from validation during training (of runs, trials and registered versions)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.formatting import Task, parse_task
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, RowKind, Score, compared_settings
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.pipelines.sampling.episodes import GroupProtocol
from metagmvae.training.trainer.package import LoadedModel

PREFIX = "validation/"


@dataclass(frozen=True)
class ComparedItem:
    """What one reference of a comparison names: its rows and, if known, its training curve."""

    ref: str
    name: str
    rows: tuple[Row, ...]
    lines: tuple[Mapping[str, Any], ...] = ()
    """Metric lines of the training."""
    is_model: bool = False
    """It is a model that can be loaded and evaluated."""
    identity: str = ""
    """Equal for two references to the same thing."""
    optional: bool = False
    """One of several items of a reference. Without any result it is left out instead of being an error."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its results by task."""

    name: str
    loaded: LoadedModel
    results: Mapping[Task, EpisodeResults]


def newest_validation(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the last metric line with validation results."""
    return next((line for line in reversed(lines) if any(key.startswith(PREFIX) for key in line)), None)


def validation_row(
    name: str, kind: RowKind, ref: str, settings: Settings, line: Mapping[str, Any], mode: str, data: str | None
) -> Row:
    """Make a row from a metric line; `data` is the fingerprint of the dataset of training and validation."""
    scores = {}
    for key, value in line.items():
        task = parse_task(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if task is not None:
            scores[task] = Score(value, line.get(f"{key}_ci95"))
    # `global_step` counts the steps of all stages.
    steps = max(line["global_step"] - settings.pretrain.steps, 0)
    protocol = validation_protocol(settings, mode, data)
    compared = compared_settings(settings.model_dump(mode="json"), data)
    return Row(name, kind, ref, protocol, scores, line["elapsed_s"], steps, compared)


def validation_protocol(settings: Settings, mode: str, data: str | None) -> EvalProtocol:
    """Return the protocol of validation during training."""
    validation = settings.validation
    split = settings.data.validation_split
    groups: GroupProtocol | None = "mixed" if validation.mix_groups else None
    return EvalProtocol(mode, split, data, validation.query, validation.episodes, validation.seed, groups=groups)
