"""Rows of a comparison: what was judged, how, on what; which rows are not comparable, and which settings differ.

Pure: rows come in, rows and notes go out. Where they come from is `infra.workflows.compare_sources`' matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from string import ascii_lowercase
from typing import Any, Literal

import numpy as np

from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.paired import across_seeds

Task = tuple[int, int]
"""(way, shot)."""
RowKind = Literal["run", "results", "model", "version", "trial", "published", "trainings"]
COMPARED = ("model.", "adapt.", "pretrain.", "train.", "trained_on")
"""Beginnings of the settings that decide how good a model is; result files keep these alone."""
IGNORED_SETTINGS = ("train.checkpoint_every", "train.log_every")
"""Settings among them that do not."""
SEED = "train.seed"


class ComparisonError(ValueError):
    """Rows that cannot be compared as they were asked to be."""


@dataclass(frozen=True)
class EvalProtocol:
    """How and on what a row was judged; None: not recorded."""

    mode: str | None
    split: str | None
    data: str | None
    """Fingerprint of the data set, or the name of one that nobody has."""
    query: int | None
    episodes: int | None
    seed: int | None

    def differences(self, other: EvalProtocol) -> list[str]:
        """`what mine, not yours` for each part that differs."""
        pairs = [(part.name, getattr(self, part.name), getattr(other, part.name)) for part in fields(self)]
        return [f"{name} {_as_text(mine)}, not {_as_text(yours)}" for name, mine, yours in pairs if mine != yours]


def _as_text(value: object) -> str:
    if value is None:
        return "unrecorded"
    return short(value) if isinstance(value, str) else str(value)


def short(fingerprint: str) -> str:
    """The first digits of a sha256; any other text as it is."""
    return fingerprint[:8] if re.fullmatch(r"[0-9a-f]{64}", fingerprint) else fingerprint


@dataclass(frozen=True)
class Score:
    """Accuracy on the episodes of one task, a share in [0, 1]."""

    accuracy: float
    ci95: float | None
    """Half width of its 95% interval; None: not recorded."""
    each: EpisodeResults | None = None
    """By episode, where that is known."""


@dataclass(frozen=True)
class Row:
    """One model judged by one protocol, or the mean of several trainings of it."""

    name: str
    kind: RowKind
    source: str
    """The reference that it comes from."""
    protocol: EvalProtocol
    scores: Mapping[Task, Score]
    seconds: float | None = None
    """Of one training."""
    steps: int | None = None
    """Of meta-training, at the moment that was judged."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted name; empty: unknown."""
    members: tuple[Row, ...] = ()
    """The trainings that a row of kind `trainings` is the mean of."""


def decisive_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; only those that decide how good a model is.

    Of contrastive training that did not take place only `pretrain.steps`, which is 0, is one.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "pretrain" and isinstance(value, Mapping) and value.get("steps") == 0:
            found["pretrain.steps"] = 0
        elif isinstance(value, Mapping):
            found |= decisive_settings(value, f"{prefix}{key}.")
        elif f"{prefix}{key}".startswith(COMPARED) and f"{prefix}{key}" not in IGNORED_SETTINGS:
            found[f"{prefix}{key}"] = value
    return found


def tasks_of(rows: Sequence[Row]) -> list[Task]:
    """Every task of any row, in order."""
    return sorted({task for row in rows for task in row.scores})


def mark_rows(rows: Sequence[Row]) -> tuple[list[str], dict[str, str]]:
    """Mark the rows that were not judged as the first one was.

    The first row that we judged ourselves is what the others are held against; rows of the paper only where there is no
    other.

    Returns:
        a mark for each row, empty where it is comparable; and what each mark means.
    """
    ours = [row for row in rows if row.kind != "published"] or rows
    marks, meaning = [], {}
    letters: dict[EvalProtocol, str] = {}
    for row in rows:
        unlike = row.protocol.differences(ours[0].protocol)
        if not unlike:
            marks.append("")
            continue
        mark = letters.setdefault(row.protocol, _letter(len(letters)))
        meaning[mark] = "; ".join(unlike)
        marks.append(mark)
    return marks, meaning


def _letter(number: int) -> str:
    """a, b, … z, aa, ab, …"""
    first, last = divmod(number, len(ascii_lowercase))
    return (_letter(first - 1) if first else "") + ascii_lowercase[last]


def check_comparable(rows: Sequence[Row]) -> None:
    """Refuse rows of different protocols, splits or data.

    Rows of the paper were all judged on data that nobody else has; they stay marked, and are not refused.

    Raises:
        ComparisonError: naming the first row that differs, and how.
    """
    ours = [row for row in rows if row.kind != "published"]
    for row in ours:
        unlike = row.protocol.differences(ours[0].protocol)
        if unlike:
            raise ComparisonError(
                f"{row.name} was not judged as {ours[0].name} was ({'; '.join(unlike)}): judge both with one request "
                "(--data), or leave out --strict"
            )


def models_of(rows: Sequence[Row]) -> list[Row]:
    """Rows of known settings, one for each model; a mean stands for its trainings."""
    members = {id(member) for row in rows for member in row.members}
    known = [row for row in rows if row.settings and id(row) not in members]
    return list({(row.name, repr(row.settings)): row for row in reversed(known)}.values())[::-1]


def differing_settings(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Settings of which two rows are known to differ, with the value of each row; None: not recorded."""
    names = sorted({name for row in rows for name in row.settings})
    values = {name: [row.settings.get(name) for row in rows] for name in names}
    return {name: row for name, row in values.items() if len({repr(v) for v in row if v is not None}) > 1}


def with_trainings(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Put the mean of trainings `NAME-seed0`, `NAME-seed1`, … behind the last of them.

    Rows are taken together where they were judged by one protocol and differ in their seed alone.

    Returns:
        all rows; and notes on those that bear such names and differ in more.
    """
    groups: dict[tuple[str, str, EvalProtocol], list[Row]] = {}
    for row in rows:
        name = training_of(row)
        if name and row.kind in ("run", "results"):
            groups.setdefault((name, row.kind, row.protocol), []).append(row)
    answer, notes = list(rows), []
    for (name, _, _), members in groups.items():
        if len(members) < 2:
            continue
        others = [key for key in differing_settings(members) if key != SEED]
        if others:
            notes.append(f"{name}-seed…: differ in more than the seed ({', '.join(others)}), so no mean is taken")
            continue
        answer.insert(answer.index(members[-1]) + 1, _mean(name, members))
    return answer, notes


def training_of(row: Row) -> str:
    """`NAME` of `NAME-seed0`; empty where it is not named so."""
    match = re.fullmatch(r"(.+)-seed\d+", row.name)
    return match[1] if match else ""


def _mean(name: str, members: list[Row]) -> Row:
    """Means over trainings with Student's interval over them; episodes keep their mean over trainings."""
    common = set.intersection(*(set(row.scores) for row in members))
    scores = {}
    for task in sorted(common):
        found = [row.scores[task] for row in members]
        mean, ci95 = across_seeds([score.accuracy for score in found])
        results = [score.each for score in found if score.each is not None]
        each = None
        if len(results) == len(found):
            each = replace(
                results[0], accuracies=np.mean([one.accuracies for one in results], axis=0), reliability=None
            )
        scores[task] = Score(mean, ci95, each)
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
