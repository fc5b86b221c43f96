"""A comparison as plain values for JSON, as text tables, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.formatting import (
    UNKNOWN,
    format_setting,
    format_value,
    p_value,
    percent,
    points,
    task_name,
)
from metagmvae.evaluation.comparison.pairwise import PairedComparison, compare_with_first
from metagmvae.evaluation.comparison.rows import (
    Row,
    Score,
    add_training_means,
    all_tasks,
    differing_settings,
    mark_rows,
    one_row_per_model,
)
from metagmvae.pipelines.files import atomic_file

INTERVALS = (
    "± is the half width of a 95% confidence interval: over episodes, or over trainings (Student's t) where a row is "
    "the mean of several"
)


@dataclass(frozen=True)
class Comparison:
    """Rows with everything that is derived from them."""

    rows: tuple[Row, ...]
    marks: tuple[str, ...]
    """One for each row; empty if its protocol is that of the reference row."""
    meaning: Mapping[str, str]
    """Mark -> how the protocol differs."""
    models: tuple[Row, ...]
    """One row for each model with recorded settings."""
    settings: Mapping[str, Sequence[Any]]
    """Settings that differ, with the value of each of `models`; None: not recorded."""
    differences: tuple[PairedComparison, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Return plain values for JSON; accuracies are fractions in [0, 1]."""
        return {
            "rows": [_plain_row(row, mark) for row, mark in zip(self.rows, self.marks, strict=True)],
            "marks": dict(self.meaning),
            "settings": [
                {"setting": name, "values": dict(zip([row.name for row in self.models], values, strict=True))}
                for name, values in self.settings.items()
            ],
            "paired": [pair.summary() for pair in self.differences],
            "notes": list(self.notes),
        }


def compare(rows: Sequence[Row], notes: Sequence[str] = ()) -> Comparison:
    """Add means over trainings, mark rows of other protocols, list differing settings, and pair equal episodes.

    `notes` come before those of the comparison itself.
    """
    with_means, mean_notes = add_training_means(rows)
    marks, meaning = mark_rows(with_means)
    models = one_row_per_model(with_means)
    return Comparison(
        tuple(with_means),
        tuple(marks),
        meaning,
        tuple(models),
        differing_settings(models),
        tuple(compare_with_first(with_means)),
        (*notes, *mean_notes),
    )


def _plain_row(row: Row, mark: str) -> dict[str, Any]:
    source = {"name": row.name, "kind": row.kind, "source": row.source, "mark": mark}
    results = [
        {"way": way, "shot": shot, "accuracy": score.accuracy, "ci95": score.ci95}
        for (way, shot), score in sorted(row.scores.items())
    ]
    protocol = {name: getattr(row.protocol, name) for name in ("mode", "split", "data", "query", "episodes", "seed")}
    cost = {"seconds": row.seconds, "steps": row.steps, "trainings": len(row.members) or 1}
    if row.protocol.groups is not None:
        protocol["groups"] = row.protocol.groups
    return source | {"results": results} | protocol | cost


def score_cell(score: Score | None) -> str:
    """Format an accuracy in percent; empty if the row lacks the task."""
    return "" if score is None else percent(score.accuracy, score.ci95)


def over_trainings_cell(pair: PairedComparison) -> str:
    """Format the difference over trainings with their number in parentheses; a dash for single trainings."""
    return UNKNOWN if pair.over_trainings is None else f"{points(*pair.over_trainings)} ({pair.trainings})"


def as_text_tables(comparison: Comparison) -> dict[str, Any]:
    """Return tables with text in their cells, accuracies in percent, by their titles."""
    tasks = all_tasks(comparison.rows)
    grouped = any(row.protocol.groups is not None for row in comparison.rows)
    columns = ["mode", "split", "query", "episodes", *(["groups"] if grouped else []), "data"]
    rows = [
        {"": mark, "name": row.name}
        | {task_name(task): score_cell(row.scores.get(task)) for task in tasks}
        | {name: format_value(getattr(row.protocol, name)) for name in columns}
        | {"seconds": format_value(row.seconds), "steps": format_value(row.steps)}
        for row, mark in zip(comparison.rows, comparison.marks, strict=True)
    ]
    tables: dict[str, Any] = {"accuracy in percent by (way,shot)": rows}
    tables |= {f"{mark}, evaluated differently": meaning for mark, meaning in comparison.meaning.items()}
    if comparison.differences:
        tables["differences on the same episodes, percentage points"] = list(map(_paired_row, comparison.differences))
    if comparison.settings:
        names = [row.name for row in comparison.models]
        tables["settings that differ"] = [
            {"setting": setting} | dict(zip(names, map(format_setting, values), strict=True))
            for setting, values in comparison.settings.items()
        ]
    return tables | {f"note {number}": note for number, note in enumerate((INTERVALS, *comparison.notes), start=1)}


def _paired_row(pair: PairedComparison) -> dict[str, str]:
    paired = pair.paired
    return {
        "name": pair.challenger,
        "against": pair.champion,
        "task": pair.task,
        "episodes": str(paired.episodes),
        "difference": points(paired.difference, paired.ci95),
        "t-test p": p_value(paired.t_test),
        "Wilcoxon p": p_value(paired.wilcoxon),
        "verdict": paired.verdict,
        "over trainings": over_trainings_cell(pair),
    }


def write_csv(path: str | Path, comparison: Comparison) -> None:
    """Write one line for each row and task. Accuracies are fractions in [0, 1]; empty cells are not recorded.

    Raises:
        DataError: the file cannot be written.
    """
    lines = []
    for row in comparison.summary()["rows"]:
        results = row.pop("results")
        lines += [row | result for result in results]
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, fieldnames=list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    with atomic_file(path) as file:
        file.write(content.getvalue().encode())
