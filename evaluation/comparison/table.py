"""A comparison as plain values, as a table for people, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.pairwise import PairedComparison, compare_with_first
from metagmvae.evaluation.comparison.rows import (
    Row,
    Score,
    Task,
    differing_settings,
    mark_rows,
    models_of,
    short,
    tasks_of,
    with_trainings,
)
from metagmvae.pipelines.files import atomic_file

INTERVALS = (
    "± is the half width of a 95% interval: over episodes, and over trainings (Student's t) where a row is the mean of "
    "several"
)

UNKNOWN = "\N{EN DASH}"
"""In a cell of which nothing is known."""


@dataclass(frozen=True)
class Comparison:
    """All that can be said of some rows without a model at hand."""

    rows: tuple[Row, ...]
    marks: tuple[str, ...]
    """One for each row; empty where it was judged as the first row of ours was."""
    meaning: Mapping[str, str]
    """What each mark stands for."""
    models: tuple[Row, ...]
    """Those of the rows that the settings are of, one for each model."""
    settings: Mapping[str, Sequence[Any]]
    """Settings that differ, with the value of each model; None: not recorded."""
    differences: tuple[PairedComparison, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """As plain values; accuracies are shares in [0, 1]."""
        return {
            "rows": [_plain_row(row, mark) for row, mark in zip(self.rows, self.marks, strict=True)],
            "marks": dict(self.meaning),
            "settings": [
                {"setting": name, "values": dict(zip([row.name for row in self.models], values, strict=True))}
                for name, values in self.settings.items()
            ],
            "paired": [one.summary() for one in self.differences],
            "notes": list(self.notes),
        }


def compare(rows: Sequence[Row], notes: Sequence[str] = ()) -> Comparison:
    """Put means over trainings in, mark what is not comparable, find what differs, and pair what can be paired.

    `notes` go before those of the comparison itself.
    """
    every, own_notes = with_trainings(rows)
    marks, meaning = mark_rows(every)
    models = models_of(every)
    return Comparison(
        tuple(every),
        tuple(marks),
        meaning,
        tuple(models),
        differing_settings(models),
        tuple(compare_with_first(every)),
        (*notes, *own_notes),
    )


def _plain_row(row: Row, mark: str) -> dict[str, Any]:
    about = {"name": row.name, "kind": row.kind, "source": row.source, "mark": mark}
    protocol = {name: getattr(row.protocol, name) for name in ("mode", "split", "data", "query", "episodes", "seed")}
    results = [
        {"way": way, "shot": shot, "accuracy": score.accuracy, "ci95": score.ci95}
        for (way, shot), score in sorted(row.scores.items())
    ]
    cost = {"seconds": row.seconds, "steps": row.steps, "trainings": len(row.members) or 1}
    return about | {"results": results} | protocol | cost


def percent(score: Score | None) -> str:
    """`97.72 ± 0.12`; empty where a row has no such task."""
    if score is None:
        return ""
    return f"{100 * score.accuracy:.2f}" + ("" if score.ci95 is None else f" ± {100 * score.ci95:.2f}")


def signed(value: float) -> str:
    """Percentage points with their sign."""
    return f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    """A p-value as text."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def task_name(task: Task) -> str:
    """A task as text: `(5,1)` for 5-way 1-shot."""
    return f"({task[0]},{task[1]})"


def format_value(value: object) -> str:
    """What is known, in short; a dash where nothing is."""
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 10 else f"{value:.4g}"
    return short(str(value))


def as_text_tables(comparison: Comparison) -> dict[str, Any]:
    """Tables whose cells are texts, accuracies in percent."""
    tasks = tasks_of(comparison.rows)
    rows = [
        {"": mark, "name": row.name}
        | {task_name(task): percent(row.scores.get(task)) for task in tasks}
        | {name: format_value(getattr(row.protocol, name)) for name in ("mode", "split", "query", "episodes", "data")}
        | {"seconds": format_value(row.seconds), "steps": format_value(row.steps)}
        for row, mark in zip(comparison.rows, comparison.marks, strict=True)
    ]
    answer: dict[str, Any] = {"accuracy in percent by (way,shot)": rows}
    answer |= {f"{mark}, judged otherwise than the first row": text for mark, text in comparison.meaning.items()}
    if comparison.differences:
        answer["differences on the same episodes, percentage points"] = [
            _paired_row(one) for one in comparison.differences
        ]
    if comparison.settings:
        names = [row.name for row in comparison.models]
        answer["settings that differ"] = [
            {"setting": setting} | dict(zip(names, map(setting_value, values), strict=True))
            for setting, values in comparison.settings.items()
        ]
    answer |= {f"note {number}": note for number, note in enumerate((INTERVALS, *comparison.notes), start=1)}
    return answer


def setting_value(value: object) -> str:
    """A setting as it was given; a dash where it was not recorded."""
    return UNKNOWN if value is None else short(str(value))


def _paired_row(one: PairedComparison) -> dict[str, str]:
    paired = one.paired
    over = one.over_trainings
    return {
        "name": one.challenger,
        "against": one.champion,
        "task": task_name((paired.way, paired.shot)),
        "episodes": str(paired.episodes),
        "difference": f"{signed(paired.difference)} ± {100 * paired.ci95:.2f}",
        "t-test p": p_value(paired.t_test),
        "Wilcoxon p": p_value(paired.wilcoxon),
        "verdict": paired.verdict,
        "over trainings": f"{signed(over[0])} ± {100 * over[1]:.2f} ({one.trainings})" if over else UNKNOWN,
    }


def write_csv(path: str | Path, comparison: Comparison) -> None:
    """One line for each row and task; accuracies are shares in [0, 1], empty cells are unknown.

    Raises:
        DataError: the file cannot be written.
    """
    lines = []
    for plain in comparison.summary()["rows"]:
        about = {key: value for key, value in plain.items() if key != "results"}
        lines += [about | result for result in plain["results"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
