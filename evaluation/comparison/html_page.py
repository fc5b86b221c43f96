"""A comparison as one page of HTML that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from metagmvae.evaluation.comparison.page_figures import COLOURS, Curve, ModelImages, draw_curves
from metagmvae.evaluation.comparison.pairwise import PairedComparison
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, Task, tasks_of
from metagmvae.evaluation.comparison.table import (
    INTERVALS,
    UNKNOWN,
    Comparison,
    format_value,
    p_value,
    percent,
    setting_value,
    signed,
    task_name,
)
from metagmvae.pipelines.files import atomic_file

TEMPLATE = "templates/report.html"
FOREST_WIDTH = 260
"""Of the plot beside each difference, in its own units."""


def write_report(
    path: str | Path,
    comparison: Comparison,
    curves: Sequence[Curve],
    models: Sequence[ModelImages],
    environment: Mapping[str, Any],
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the file.
        comparison: rows, marks, differences.
        curves: of the trainings that are known.
        models: pictures of each model that was judged for this comparison.
        environment: by `environment_record`.

    Raises:
        DataError: the file cannot be written.
    """
    page = render(comparison, curves, models, environment)
    with atomic_file(path) as file:
        file.write(page.encode())


def render(
    comparison: Comparison, curves: Sequence[Curve], models: Sequence[ModelImages], environment: Mapping[str, Any]
) -> str:
    """The page. Everything that goes into it is escaped; its own policy forbids scripts and anything from outside."""
    template = resources.files("metagmvae.evaluation.comparison").joinpath(TEMPLATE).read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    legend = [(COLOURS[number % len(COLOURS)], curve.name) for number, curve in enumerate(curves)]
    tasks = tasks_of(comparison.rows)
    return jinja.from_string(template).render(
        sentences=_sentences(comparison),
        intervals=INTERVALS,
        tasks=[task_name(task) for task in tasks],
        rows=_rows(comparison, tasks),
        meaning=comparison.meaning,
        notes=comparison.notes,
        forest=_forest(comparison.differences),
        settings_of=[row.name for row in comparison.models],
        settings={name: [setting_value(value) for value in row] for name, row in comparison.settings.items()},
        curves=draw_curves(curves),
        legend=legend,
        models=models,
        errors=[
            (one.name, task_name(task), f"{100 * error:.2f}") for one in models for task, error in one.errors.items()
        ],
        environment=environment,
    )


def _sentences(comparison: Comparison) -> list[str]:
    """What comes out, in words: the best of the comparable rows for each task, then each verdict."""
    said = []
    for task in tasks_of(comparison.rows):
        best = _best(comparison, task)
        if best is not None:
            said.append(f"{task_name(task)}: {best.name} is the most accurate with {percent(best.scores[task])}%.")
    for one in comparison.differences:
        paired = one.paired
        where = f"{paired.episodes:,} episodes of {task_name((paired.way, paired.shot))}, {paired.mode}, {one.split}"
        amount = f"{signed(paired.difference)} ± {100 * paired.ci95:.2f} points"
        verdict = {
            "better": f"{one.challenger} is better than {one.champion}",
            "worse": f"{one.challenger} is worse than {one.champion}",
            "undecided": f"Between {one.challenger} and {one.champion} nothing is decided",
        }[paired.verdict]
        over = ""
        if one.over_trainings is not None:
            mean, ci95 = one.over_trainings
            over = f"; over {one.trainings} trainings {signed(mean)} ± {100 * ci95:.2f}"
        said.append(f"{verdict} on the same {where}: {amount}{over}.")
    return said


def _best(comparison: Comparison, task: Task) -> Row | None:
    """The most accurate of the rows that may be compared; None where there is nothing to be better than.

    A mean stands for its trainings: the luckiest of them would be no fair rival.
    """
    members = {id(member) for row in comparison.rows for member in row.members}
    rivals = [
        row
        for row, mark in zip(comparison.rows, comparison.marks, strict=True)
        if not mark and task in row.scores and row.kind != "published" and id(row) not in members
    ]
    return max(rivals, key=lambda row: row.scores[task].accuracy) if len(rivals) > 1 else None


def _rows(comparison: Comparison, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    best = {task: _best(comparison, task) for task in tasks}
    members = {id(member) for row in comparison.rows for member in row.members}
    answer = []
    for row, mark in zip(comparison.rows, comparison.marks, strict=True):
        protocol = row.protocol
        cells = [(percent(row.scores.get(task)), best[task] is row) for task in tasks]
        style = "member" if id(row) in members else row.kind
        answer.append(
            {
                "name": row.name,
                "mark": mark,
                "style": style,
                "source": row.source if row.source != row.name and row.kind != "trainings" else "",
                "cells": cells,
                "judged_on": f"{protocol.split or UNKNOWN} of {format_value(protocol.data)}",
                "how": _how(protocol),
                "cost": [format_value(row.seconds), format_value(row.steps)],
            }
        )
    return answer


def _how(protocol: EvalProtocol) -> str:
    """The protocol in words; what nobody has said is left out."""
    parts = [protocol.mode or "mode not said"]
    for value, unit in ((protocol.query, "queries"), (protocol.episodes, "episodes")):
        if value is not None:
            parts.append(f"{value:,} {unit}")
    return ", ".join([*parts, *([f"seed {protocol.seed}"] if protocol.seed is not None else [])])


def _forest(contests: Sequence[PairedComparison]) -> dict[str, Any]:
    """Differences and intervals in the units of the plot; one scale for all, zero always on it."""
    ends = [0.0]
    for one in contests:
        intervals = [(one.paired.difference, one.paired.ci95), *([one.over_trainings] if one.over_trainings else [])]
        ends += [100 * (middle + side * half) for middle, half in intervals for side in (-1, 1)]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def x(share: float) -> float:
        return round(FOREST_WIDTH * (100 * share - low) / (high - low), 1)

    rows = []
    for one in contests:
        paired = one.paired
        over = one.over_trainings
        rows.append(
            {
                "challenger": one.challenger,
                "champion": one.champion,
                "task": f"{task_name((paired.way, paired.shot))} {paired.mode}, {one.split}",
                "difference": f"{signed(paired.difference)} ± {100 * paired.ci95:.2f}",
                "over": f"{signed(over[0])} ± {100 * over[1]:.2f} ({one.trainings})" if over else UNKNOWN,
                "tests": [p_value(paired.t_test), p_value(paired.wilcoxon)],
                "verdict": paired.verdict,
                "bar": [x(paired.difference - paired.ci95), x(paired.difference), x(paired.difference + paired.ci95)],
                "over_bar": [x(over[0] - over[1]), x(over[0]), x(over[0] + over[1])] if over else None,
            }
        )
    return {"rows": rows, "zero": x(0.0), "width": FOREST_WIDTH, "ends": [f"{low:+.1f}", f"{high:+.1f}"]}
