"""A comparison as one self-contained HTML page: no script, and no font or image from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from metagmvae.evaluation.comparison.formatting import (
    UNKNOWN,
    Task,
    format_setting,
    format_value,
    p_value,
    points,
    task_name,
)
from metagmvae.evaluation.comparison.page_figures import COLOURS, ModelImages, draw_curves
from metagmvae.evaluation.comparison.pairwise import PairedComparison
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, all_tasks, trainings_of_means
from metagmvae.evaluation.comparison.table import INTERVALS, Comparison, over_trainings_cell, score_cell
from metagmvae.evaluation.comparison.validation_rows import ComparedItem
from metagmvae.pipelines.files import atomic_file

TEMPLATES = resources.files("metagmvae.evaluation.comparison").joinpath("templates")
FOREST_WIDTH = 260
"""Width of the interval plot beside each difference, in units of its SVG."""


def write_report(
    path: str | Path,
    comparison: Comparison,
    curves: Sequence[ComparedItem],
    models: Sequence[ModelImages],
    environment: Mapping[str, Any],
) -> None:
    """Write the page atomically.

    Everything inserted is escaped, and the page's content security policy forbids scripts and external resources.

    `environment` is the result of `evaluation.provenance.provenance`.

    Raises:
        DataError: the file cannot be written.
    """
    tasks = all_tasks(comparison.rows)
    write_page(
        path,
        "report.html",
        sentences=_sentences(comparison),
        intervals=INTERVALS,
        tasks=[task_name(task) for task in tasks],
        rows=_rows(comparison, tasks),
        meaning=comparison.meaning,
        notes=comparison.notes,
        forest=_forest(comparison.differences),
        settings_of=[row.name for row in comparison.models],
        settings={name: [format_setting(value) for value in row] for name, row in comparison.settings.items()},
        curves=draw_curves(curves),
        legend=[(COLOURS[number % len(COLOURS)], curve.name) for number, curve in enumerate(curves)],
        models=models,
        errors=[
            (model.name, task_name(task), f"{100 * error:.2f}")
            for model in models
            for task, error in model.calibration_errors.items()
        ],
        environment=environment,
    )


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Render a template of this folder with values and write it atomically; everything inserted is escaped.

    Raises:
        DataError: the file cannot be written.
    """
    loader = FunctionLoader(lambda name: TEMPLATES.joinpath(name).read_text(encoding="utf-8"))
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    page = jinja.get_template(template).render(**values)
    with atomic_file(path) as file:
        file.write(page.encode())


def _sentences(comparison: Comparison) -> list[str]:
    """Summarise the result: the most accurate comparable row for each task, then the verdict of each pair."""
    sentences = []
    for task in all_tasks(comparison.rows):
        best = _best(comparison, task)
        if best is not None:
            score = score_cell(best.scores[task])
            sentences.append(f"{best.name} is the most accurate comparable model on {task_name(task)}: {score}%.")
    for pair in comparison.differences:
        paired = pair.paired
        verdict = {
            "better": f"{pair.challenger} is better than {pair.champion}",
            "worse": f"{pair.challenger} is worse than {pair.champion}",
            "undecided": f"The difference between {pair.challenger} and {pair.champion} is not significant",
        }[paired.verdict]
        where = f"{pair.task} ({paired.episodes:,} shared episodes, {paired.mode}, {pair.split} split)"
        difference = f"{points(paired.difference, paired.ci95)} points"
        if pair.over_trainings is not None:
            difference += f"; over {pair.trainings} trainings {points(*pair.over_trainings)} points"
        sentences.append(f"{verdict} on {where}: {difference}.")
    return sentences


def _best(comparison: Comparison, task: Task) -> Row | None:
    """Return the most accurate of the comparable rows; None if there are fewer than two.

    A mean replaces its trainings: the best of several trainings would be a biased choice.
    """
    members = trainings_of_means(comparison.rows)
    candidates = [
        row
        for row, mark in zip(comparison.rows, comparison.marks, strict=True)
        if not mark and task in row.scores and row.kind != "published" and id(row) not in members
    ]
    return max(candidates, key=lambda row: row.scores[task].accuracy) if len(candidates) > 1 else None


def _rows(comparison: Comparison, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    best = {task: _best(comparison, task) for task in tasks}
    members = trainings_of_means(comparison.rows)
    return [
        {
            "name": row.name,
            "mark": mark,
            "style": "member" if id(row) in members else row.kind,
            "source": row.source if row.source != row.name and row.kind != "trainings" else "",
            "cells": [(score_cell(row.scores.get(task)), best[task] is row) for task in tasks],
            "evaluated_on": f"{row.protocol.split or UNKNOWN} split, data {format_value(row.protocol.data)}",
            "protocol": _protocol(row.protocol),
            "cost": [format_value(row.seconds), format_value(row.steps)],
        }
        for row, mark in zip(comparison.rows, comparison.marks, strict=True)
    ]


def _protocol(protocol: EvalProtocol) -> str:
    """Format mode, queries, episodes, groups and seed; values that are not recorded are left out."""
    parts = [protocol.mode or "mode not recorded"]
    for value, unit in ((protocol.query, "queries per class"), (protocol.episodes, "episodes")):
        if value is not None:
            parts.append(f"{value:,} {unit}")
    if protocol.groups is not None:
        parts.append(f"groups {protocol.groups}")
    return ", ".join([*parts, *([f"seed {protocol.seed}"] if protocol.seed is not None else [])])


def _forest(pairs: Sequence[PairedComparison]) -> dict[str, Any]:
    """Return the differences and intervals in plot units. All rows share one axis, which contains zero."""
    ends = [0.0]
    for pair in pairs:
        intervals = [(pair.paired.difference, pair.paired.ci95)]
        intervals += [pair.over_trainings] if pair.over_trainings else []
        ends += [100 * (mean + sign * ci95) for mean, ci95 in intervals for sign in (-1, 1)]
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - margin, max(ends) + margin

    def x(fraction: float) -> float:
        return round(FOREST_WIDTH * (100 * fraction - low) / (high - low), 1)

    def bar(mean: float, ci95: float) -> list[float]:
        return [x(mean - ci95), x(mean), x(mean + ci95)]

    rows = []
    for pair in pairs:
        paired = pair.paired
        rows.append(
            {
                "challenger": pair.challenger,
                "champion": pair.champion,
                "task": f"{pair.task} {paired.mode}, {pair.split}",
                "difference": points(paired.difference, paired.ci95),
                "over": over_trainings_cell(pair),
                "tests": [p_value(paired.t_test), p_value(paired.wilcoxon)],
                "verdict": paired.verdict,
                "bar": bar(paired.difference, paired.ci95),
                "over_bar": bar(*pair.over_trainings) if pair.over_trainings else None,
            }
        )
    return {"rows": rows, "zero": x(0.0), "width": FOREST_WIDTH, "ends": [f"{low:+.1f}", f"{high:+.1f}"]}
