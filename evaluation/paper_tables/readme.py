"""Renders the tables of README.md and of the pages in evaluation/results, between markers.

Accuracies and speeds come from the recorded results; hardware and time of the presets from the heads of their files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from metagmvae.configs.describe import preset_head
from metagmvae.configs.load import presets
from metagmvae.evaluation.comparison import record_tables
from metagmvae.evaluation.comparison.formatting import markdown_code, markdown_table, markdown_text, percent, task_name
from metagmvae.evaluation.comparison.results_table import (
    accuracy_cell,
    calibration_table,
    open_table,
    paired_table,
    queries_table,
    results_by_task,
    results_table,
    summary_table,
)
from metagmvae.evaluation.paper_tables.page_table import page_table
from metagmvae.pipelines.files import atomic_file, check_document, read_json
from metagmvae.pipelines.records import DataError

PRESET_TASKS = ((5, 1), (5, 5))

RESULTS = Path(__file__).parents[1] / "results"
"""Recorded results of a source checkout; an installed package has none."""
PAGES = (
    "README.md",
    *(f"evaluation/results/{page}.md" for page in ("README", "omniglot", "mini-imagenet", "paper-tables", "speed")),
)


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
    head = ["preset", "trains", "hardware", "time", *(f"{task_name(task)} accuracy" for task in PRESET_TASKS)]
    return markdown_table(head, [_preset_row(results, preset) for preset in shown])


def _preset_row(results: Path, preset: str) -> list[str]:
    head = preset_head(preset)
    return [f"`{preset}`", head.title, head.hardware, head.time, *preset_accuracies(results, preset).values()]


def preset_accuracies(results: Path, preset: str) -> dict[str, str]:
    """Recorded accuracy of a preset in percent by task, `(5,1)`; empty where none is recorded."""
    by_task = results_by_task(results, preset)
    return {task_name(task): accuracy_cell(by_task.get(task, ())) for task in PRESET_TASKS}


class _FitTask(BaseModel):
    """A row of `accuracy` or `baselines` in a record of `metagmvae fit`."""

    way: int
    shot: int
    accuracy: float
    ci95: float
    ece: float | None = None
    baseline: str = ""


class _FitRecord(BaseModel):
    """The keys of a record of `metagmvae fit --record` that the table shows."""

    samples: dict[str, int]
    classes: dict[str, int]
    preset: str
    steps: dict[str, int]
    accuracy: list[_FitTask]
    baselines: list[_FitTask]
    budget_s: float
    seconds: dict[str, float]


def fit_table(results: Path, names: str) -> str:
    """One row for each record of `metagmvae fit`, `fit-NAME.json`: the pictures, the training, accuracy, calibration.

    Args:
        results: folder of the result files.
        names: of the records, separated by commas.

    Raises:
        DataError: a file is missing, or is not such a record.
    """
    head = ["pictures", "images (classes) to train on, classes to test on", "preset, steps", "minutes (budget)"]
    for task in PRESET_TASKS:
        head += [f"{task_name(task)} accuracy", f"{task_name(task)}: nearest class mean", f"{task_name(task)}: ECE"]
    return markdown_table(head, [_fit_row(results / f"fit-{name}.json", name) for name in names.split(",")])


def _fit_row(path: Path, name: str) -> list[str]:
    record = check_document(_FitRecord, read_json(path), path, "so it is no record of metagmvae fit; record it again")
    seconds = record.seconds.get("all", 0.0)
    row = [
        markdown_text(name),
        f"{record.samples['train']:,} ({record.classes['train']:,}), {record.classes.get('test', 0):,}",
        f"{markdown_code(record.preset)}, {' + '.join(f'{steps:,}' for steps in record.steps.values())}",
        f"{seconds / 60:.0f} ({record.budget_s / 60:.0f})",
    ]
    for task in PRESET_TASKS:
        ours = next((each for each in record.accuracy if (each.way, each.shot) == task), None)
        mean = next(
            (b for b in record.baselines if (b.way, b.shot) == task and b.baseline == "nearest class mean"), None
        )
        row += ["" if each is None else percent(each.accuracy, each.ci95) for each in (ours, mean)]
        row.append("" if ours is None or ours.ece is None else f"{ours.ece:.3f}")
    return row


TABLES: dict[str, Callable[[Path, str], str]] = {
    "table": lambda results, names: results_table(results, names.split(",")),
    "summary": summary_table,
    "ablation": record_tables.ablation_table,
    "bench": record_tables.bench_table,
    "curve": record_tables.curve_table,
    "fit": fit_table,
    "presets": preset_table,
    "paired": paired_table,
    "calibration": calibration_table,
    "queries": queries_table,
    "open": open_table,
    "paper-table": page_table,
    "promotion": record_tables.promotion_table,
    "sweep": record_tables.sweep_table,
}
"""Kind of a marker -> table as Markdown, from the folder of results and the name in the marker."""

MARKER = re.compile(rf"<!-- ({'|'.join(TABLES)}):(\S+) -->(.*?)<!-- /\1 -->", re.DOTALL)
START = re.compile(rf"<!-- ({'|'.join(TABLES)}):\S+ -->")


def render_tables(page: str, results: Path) -> str:
    """Return the page with the table between each `<!-- KIND:NAME -->` and `<!-- /KIND -->` rendered afresh.

    Raises:
        DataError: a marker has no end or an unknown name, or a result file is missing.
    """
    markers = list(MARKER.finditer(page))
    if len(START.findall(page)) != len(markers) or any(START.search(match[3]) for match in markers):
        raise DataError("a marker <!-- KIND:NAME --> has no <!-- /KIND --> behind its table; add it")

    def render(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        return f"<!-- {kind}:{name} -->\n{TABLES[kind](results, name)}\n<!-- /{kind} -->"

    return MARKER.sub(render, page)


def write_pages() -> list[str]:
    """Render the tables of `PAGES` in place; return the files that changed.

    Raises:
        DataError: the package does not run from a source checkout, or a page cannot be rendered.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        raise DataError(f"--write: {root} is not a source checkout; run `make docs` in a clone of the repository")
    changed = []
    for name in PAGES:
        path = root / name
        if not path.is_file():
            continue
        page = path.read_text(encoding="utf-8")
        try:
            rendered = render_tables(page, root / "evaluation" / "results")
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if rendered != page:
            with atomic_file(path) as file:
                file.write(rendered.encode())
            changed.append(name)
    return changed
