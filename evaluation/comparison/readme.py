"""The README's table, made from the result files that `metagmvae evaluate --record` wrote."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.paper import BY_REF, TASKS, DatasetName
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError


@dataclass(frozen=True)
class Columns:
    """A data set: the tasks that its table shows, and the paper's rows."""

    title: str
    tasks: tuple[tuple[int, int], ...]
    """(way, shot)."""
    published: dict[str, tuple[float, ...]]


def _columns(title: str, dataset: DatasetName, published: dict[str, str]) -> Columns:
    """Columns of Table 1, and rows of the paper by the label that they have here."""
    tasks = TASKS[dataset]
    rows = {label: BY_REF[f"paper:{dataset}/{key}"].values(tasks) for label, key in published.items()}
    return Columns(title, tasks, rows)


OMNIGLOT = _columns(
    "Omniglot",
    "omniglot",
    {"paper: Meta-GMVAE (transductive)": "meta-gmvae", "paper: supervised ProtoNets": "protonets"},
)
"""Table 1 of Lee et al., ICLR 2021; their own draw of the 1200-100-323 split."""

MINI_IMAGENET = _columns(
    "Mini-ImageNet",
    "mini-imagenet",
    {
        "paper: Meta-GMVAE (transductive), Conv5, 400 epochs of SimCLR": "meta-gmvae",
        "paper: UMTRA on the same features": "umtra-simclr",
    },
)
"""Tables 1 and 10 of Lee et al., ICLR 2021; the split of Ravi & Larochelle."""


def results_table(results: Path, names: Sequence[str]) -> str:
    """Markdown: one row per name, the paper's below them; accuracy in percent with its 95% interval.

    A name stands for the files `NAME-5way-1shot.json` and so on; names that begin with `mini-imagenet` make a table of
    that data set. Where there are several trainings, `NAME-seed0-5way-1shot.json` and so on, the cell is their mean and
    the standard deviation between them. `NAME+` adds a row for each baseline in the files, on the same episodes.

    Raises:
        DataError: a name has no result at all.
    """
    of = {name.startswith("mini-imagenet") for name in names}
    if len(of) != 1:
        raise DataError(f"{', '.join(names)}: a table is of one data set; name the runs of each apart")
    columns = MINI_IMAGENET if of.pop() else OMNIGLOT
    head = [f"({way},{shot})" for way, shot in columns.tasks]
    rows = [[f"{columns.title} (way,shot)", *head], ["---"] * (1 + len(head))]
    for asked in names:
        name = asked.removesuffix("+")
        found = [_results(results, name, way, shot) for way, shot in columns.tasks]
        if not any(found):
            raise DataError(f"{results}: no result of {name!r} there ({name}-5way-1shot.json and so on)")
        rows.append([f"**`{name}`**{_about(found)}", *map(_cell, found)])
        if asked != name:
            rows += [[f"{label}{_about(cells)}", *map(_cell, cells)] for label, cells in _baselines(found).items()]
    rows += [[label, *(f"{value:.2f}" for value in values)] for label, values in columns.published.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _results(results: Path, name: str, way: int, shot: int) -> list[dict[str, Any]]:
    single = results / f"{name}-{way}way-{shot}shot.json"
    files = [single] if single.exists() else sorted(results.glob(f"{name}-seed*-{way}way-{shot}shot.json"))
    return [read_json(file) for file in files]


def _baselines(found: list[list[dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """What stands beside the results in their files, by its name."""
    labels = dict.fromkeys(row["baseline"] for some in found for result in some for row in result.get("baselines", []))
    return {
        label: [
            [row for result in some for row in result.get("baselines", []) if row["baseline"] == label]
            for some in found
        ]
        for label in labels
    }


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
