"""The README's table, made from the result files that `metagmvae evaluate --record` wrote."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.files import read_json
from pipelines.records import DataError

TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))

PUBLISHED = {
    "paper: Meta-GMVAE (transductive)": (94.92, 97.09, 82.21, 90.61),
    "paper: supervised ProtoNets": (98.35, 99.58, 95.31, 98.81),
}
"""Omniglot, Table 1 of Lee et al., ICLR 2021; their own draw of the 1200-100-323 split."""


def results_table(results: Path, names: Sequence[str]) -> str:
    """Markdown: one row per name, the paper's below them; accuracy in percent with its 95% interval.

    A name stands for the files `NAME-5way-1shot.json` and so on. Where there are several trainings,
    `NAME-seed0-5way-1shot.json` and so on, the cell is their mean and the standard deviation between them.

    Raises:
        DataError: a name has no result at all.
    """
    head = [f"({way},{shot})" for way, shot in TASKS]
    rows = [["Omniglot (way,shot)", *head], ["---"] * 5]
    for name in names:
        found = [_results(results, name, way, shot) for way, shot in TASKS]
        if not any(found):
            raise DataError(f"{results}: no result of {name!r} there ({name}-5way-1shot.json and so on)")
        rows.append([f"**`{name}`**{_about(found)}", *map(_cell, found)])
    rows += [[label, *(f"{value:.2f}" for value in values)] for label, values in PUBLISHED.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _results(results: Path, name: str, way: int, shot: int) -> list[dict[str, Any]]:
    single = results / f"{name}-{way}way-{shot}shot.json"
    files = [single] if single.exists() else sorted(results.glob(f"{name}-seed*-{way}way-{shot}shot.json"))
    return [read_json(file) for file in files]


def _about(found: list[list[dict[str, Any]]]) -> str:
    """Protocol and number of trainings, from the files themselves."""
    modes = sorted({result["mode"] for some in found for result in some})
    trainings = max(len(some) for some in found)
    return f" ({', '.join(modes)}{f', {trainings} trainings' if trainings > 1 else ''})"


def _cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    accuracies = [100 * result["accuracy"] for result in found]
    spread = 100 * found[0]["ci95"] if len(found) == 1 else statistics.stdev(accuracies)
    return f"{statistics.fmean(accuracies):.2f} ± {spread:.2f}"


def render_readme(text: str, results: Path) -> str:
    """The README with every table between its markers, `<!-- table:NAME,NAME -->`, made afresh."""

    def fresh(match: re.Match[str]) -> str:
        names = match.group(1)
        return f"<!-- table:{names} -->\n{results_table(results, names.split(','))}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\S+) -->.*?<!-- /table -->", fresh, text, flags=re.DOTALL)
