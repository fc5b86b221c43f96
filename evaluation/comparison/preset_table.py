"""Markdown table of the bundled presets: hardware and time from the head of each file, accuracy from the results."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from metagmvae.configs.load import presets
from metagmvae.evaluation.comparison.formatting import task_name
from metagmvae.evaluation.comparison.record_tables import markdown_table
from metagmvae.evaluation.comparison.results_table import accuracy_cell, results_by_task
from metagmvae.pipelines.records import DataError

TASKS = ((5, 1), (5, 5))
HEAD = re.compile(r"^(?P<title>.*?)\. .*Hardware: (?P<hardware>.*?)\. Time: (?P<time>.*?)\. Score: ")


def preset_table(results: Path, name: str) -> str:
    """One row for each preset: what it trains, hardware, time, and recorded accuracy in percent.

    Args:
        results: folder of the result files; a preset without results has empty cells.
        name: part of the preset names to show (`omniglot`), or `all`.

    Raises:
        DataError: no preset has this in its name, or the head of a preset lacks a part.
    """
    shown = [preset for preset in presets() if name == "all" or name in preset]
    if not shown:
        raise DataError(f"presets:{name}: no preset has this in its name; use all")
    head = ["preset", "trains", "hardware", "time", *(f"{task_name(task)} accuracy" for task in TASKS)]
    return markdown_table(head, [_row(results, preset) for preset in shown])


def _row(results: Path, preset: str) -> list[str]:
    file = resources.files("metagmvae.configs").joinpath("presets", f"{preset}.toml")
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    found = HEAD.match(comment)
    if found is None:
        raise DataError(f"{preset}.toml: its head comment needs a sentence, Hardware: …, Time: … and Score: …")
    title = found["title"].partition(" (Lee et al.")[0].partition(" (paper:")[0]
    by_task = results_by_task(results, preset)
    cells = [accuracy_cell(by_task.get(task, ())) for task in TASKS]
    return [f"`{preset}`", title, found["hardware"], found["time"], *cells]
