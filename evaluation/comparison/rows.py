"""Rows of a comparison: accuracies with their protocol and settings, which rows are comparable, means over trainings.

These are plain functions of rows. `infra.workflows.compare_sources` reads the rows from runs, files and the registry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from string import ascii_lowercase
from typing import Any, Literal

import numpy as np

from metagmvae.evaluation.comparison.formatting import Task, short
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.paired import across_seeds
from metagmvae.pipelines.sampling.episodes import GroupProtocol

RowKind = Literal["run", "results", "model", "encoder", "version", "trial", "published", "trainings"]
COMPARED = ("method.", "model.", "adapt.", "pretrain.", "train.", "trained_on")
"""Prefixes of the settings that affect accuracy. Result files hold only these."""
OPTION = ".options."
"""Part of the names of options of what another package adds."""
IGNORED_SETTINGS = ("train.checkpoint_every", "train.log_every")
"""Settings with these prefixes that do not affect accuracy."""
SEED = "train.seed"


class ComparisonError(ValueError):
    """Rows that cannot be compared in the requested way."""


@dataclass(frozen=True)
class EvalProtocol:
    """How and on which data a row was evaluated; None: not recorded."""

    mode: str | None
    split: str | None
    data: str | None
    """Fingerprint of the dataset, or a description of data that is not available."""
    query: int | None
    episodes: int | None
    seed: int | None
    unbalanced: bool = False
    """Whether only half of the classes had `query` queries, and the others one each."""
    dirichlet: float | None = None
    """Alpha of the Dirichlet distribution of the proportions of the classes; None: not drawn from one."""
    groups: GroupProtocol | None = None
    """Whether labelled images and queries were of different groups; None: there are no groups, or not recorded."""

    def differences(self, other: EvalProtocol) -> list[str]:
        """Return `NAME MINE, not THEIRS` for each field that differs."""
        pairs = [(part.name, getattr(self, part.name), getattr(other, part.name)) for part in fields(self)]
        return [f"{name} {_as_text(mine)}, not {_as_text(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def _as_text(value: object) -> str:
    return "unrecorded" if value is None else short(str(value))


@dataclass(frozen=True)
class Score:
    """Accuracy on the episodes of one task, a fraction in [0, 1]."""

    accuracy: float
    ci95: float | None
    """Half width of its 95% confidence interval; None: not recorded."""
    by_episode: EpisodeResults | None = None
    """Accuracy of each episode; None: not recorded."""


@dataclass(frozen=True)
class Row:
    """One model evaluated by one protocol, or the mean over several trainings."""

    name: str
    kind: RowKind
    source: str
    """The reference that the row was read from."""
    protocol: EvalProtocol
    scores: Mapping[Task, Score]
    seconds: float | None = None
    """Duration of one training."""
    steps: int | None = None
    """Meta-training steps of the evaluated model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings by dotted name; empty: not recorded."""
    members: tuple[Row, ...] = ()
    """The trainings behind a row of kind `trainings`."""


def decisive_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names and keep those that affect accuracy.

    Without pre-training (`pretrain.steps = 0`) its other settings are left out, and those of other methods for
    Meta-GMVAE.
    """
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key == "pretrain" and isinstance(value, Mapping) and value.get("steps") == 0:
            settings["pretrain.steps"] = 0
        elif key == "method" and isinstance(value, Mapping) and value.get("name") == "meta-gmvae":
            settings["method.name"] = "meta-gmvae"
        elif isinstance(value, Mapping):
            settings |= decisive_settings(value, f"{name}.")
        elif name.startswith(COMPARED) and name not in IGNORED_SETTINGS:
            settings[name] = value
    return settings


def compared_settings(tree: Mapping[str, Any], trained_on: str | None) -> dict[str, Any]:
    """Return the settings that affect accuracy by dotted name, with the fingerprint of the training data."""
    return decisive_settings(tree) | ({"trained_on": trained_on} if trained_on else {})


def all_tasks(rows: Sequence[Row]) -> list[Task]:
    """Return the tasks of all rows, sorted."""
    return sorted({task for row in rows for task in row.scores})


def mark_rows(rows: Sequence[Row]) -> tuple[list[str], dict[str, str]]:
    """Mark the rows whose protocol differs from that of the reference row.

    The reference is the first row that is not of the paper, or the first row if all are.

    Returns:
        The mark of each row, empty if it is comparable; and the differences that each mark stands for.
    """
    reference = next((row for row in rows if row.kind != "published"), rows[0])
    marks, meaning = [], {}
    letters: dict[EvalProtocol, str] = {}
    for row in rows:
        differences = row.protocol.differences(reference.protocol)
        mark = letters.setdefault(row.protocol, _letter(len(letters))) if differences else ""
        marks.append(mark)
        if mark:
            meaning[mark] = "; ".join(differences)
    return marks, meaning


def _letter(number: int) -> str:
    """Return a, b, …, z, aa, ab, … for 0, 1, …"""
    first, last = divmod(number, len(ascii_lowercase))
    return (_letter(first - 1) if first else "") + ascii_lowercase[last]


def check_comparable(rows: Sequence[Row]) -> None:
    """Refuse rows of different protocols, splits or datasets.

    Rows of the paper are not refused: they are marked, as their data is not available.

    Raises:
        ComparisonError: names the first row that differs, and its differences.
    """
    ours = [row for row in rows if row.kind != "published"]
    for row in ours:
        differences = row.protocol.differences(ours[0].protocol)
        if differences:
            raise ComparisonError(
                f"{row.name} was not evaluated like {ours[0].name} ({'; '.join(differences)}): "
                "evaluate both with --data, or omit --strict"
            )


def trainings_of_means(rows: Sequence[Row]) -> set[int]:
    """Return the `id` of each row whose mean is one of the rows too."""
    return {id(member) for row in rows for member in row.members}


def one_row_per_model(rows: Sequence[Row]) -> list[Row]:
    """Return one row with recorded settings for each model. A mean replaces its trainings."""
    members = trainings_of_means(rows)
    known = [row for row in rows if row.settings and id(row) not in members]
    return list({(row.name, repr(row.settings)): row for row in reversed(known)}.values())[::-1]


def differing_settings(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return the settings that differ between two rows, with the value of each row; None: not recorded.

    An option that a row does not have is a difference, for it has its default there; other settings, and rows without
    any, may be older than the setting.
    """
    differing = {}
    for name in sorted({name for row in rows for name in row.settings}):
        recorded = [row for row in rows if name in row.settings or (OPTION in name and row.settings)]
        if len({repr(row.settings.get(name)) for row in recorded}) > 1:
            differing[name] = [row.settings.get(name) for row in rows]
    return differing


def add_training_means(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Insert the mean over the trainings `NAME-seed0`, `NAME-seed1`, … after the last of them.

    A mean is taken over rows of the same protocol whose settings differ only in the seed.

    Returns:
        All rows; and notes on rows with such names whose other settings differ.
    """
    groups: dict[tuple[str, str, EvalProtocol], list[Row]] = {}
    for row in rows:
        match = re.fullmatch(r"(.+)-seed\d+", row.name)
        if match and row.kind in ("run", "results"):
            groups.setdefault((match[1], row.kind, row.protocol), []).append(row)
    with_means, notes = list(rows), []
    for (name, _, _), members in groups.items():
        if len(members) < 2:
            continue
        others = [key for key in differing_settings(members) if key != SEED]
        if others:
            notes.append(f"{name}-seed…: no mean is shown, because other settings differ too ({', '.join(others)})")
            continue
        with_means.insert(with_means.index(members[-1]) + 1, _mean(name, members))
    return with_means, notes


def _mean(name: str, members: list[Row]) -> Row:
    """Average over trainings, with Student's t interval; the accuracy of each episode is averaged too."""
    scores = {}
    for task in sorted(set.intersection(*(set(row.scores) for row in members))):
        task_scores = [row.scores[task] for row in members]
        mean, ci95 = across_seeds([score.accuracy for score in task_scores])
        results = [score.by_episode for score in task_scores if score.by_episode is not None]
        by_episode = None
        if len(results) == len(task_scores):
            accuracies = np.mean([result.accuracies for result in results], axis=0)
            by_episode = replace(results[0], accuracies=accuracies, reliability=None)
        scores[task] = Score(mean, ci95, by_episode)
    seconds = [row.seconds for row in members if row.seconds is not None]
    settings = dict(members[0].settings)
    if SEED in settings:
        settings[SEED] = ", ".join(str(row.settings[SEED]) for row in members)
    return replace(
        members[0],
        name=f"{name} ({len(members)} trainings)",
        kind="trainings",
        source=", ".join(row.source for row in members),
        scores=scores,
        seconds=fmean(seconds) if seconds else None,
        settings=settings,
        members=tuple(members),
    )
