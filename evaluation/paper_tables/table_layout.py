"""Lays out a table of the paper with our results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from metagmvae.evaluation.comparison.formatting import (
    markdown_code,
    markdown_table,
    markdown_text,
    percent,
    points,
    task_name,
)
from metagmvae.evaluation.comparison.results_table import TITLES
from metagmvae.evaluation.paper_tables.paper_table import Cell, DocumentPart, DocumentRow, TableDocument

NOT_RUN = "not run"
DIFFERENCES = (
    "Differences: percentage points above the base row on the same episodes ± the 95% interval, over episodes for one "
    "training, over trainings (Student's t) for several."
)


def markdown_document(document: TableDocument) -> str:
    """Lay out a document as Markdown tables; a system has a line of the paper, where that has one, and ours."""
    tables = [_titled(document, part) for part in document.parts]
    shown = "all results" if document.budget_s is None else f"results with a budget of {document.budget_s:,.0f} s"
    notes = [
        "Accuracy in percent ± its 95% interval over episodes, or ± the standard deviation over trainings. "
        f"Ours: {shown} in {markdown_text(document.results)}; {document.not_run} of {document.cells} are not run."
    ]
    if any(part.base for part in document.parts):
        notes.append(DIFFERENCES)
    notes += [f"Not shown: {markdown_text(line)}." for line in document.near]
    return "\n\n".join([*tables, *notes])


def markdown_results(document: TableDocument, dataset: str = "") -> str:
    """Lay out the rows with a result and those with a reason for having none; the others are counted below each table.

    Args:
        document: the table.
        dataset: only parts with columns of it; empty: all parts. Parts without any result are left out.
    """
    texts = []
    for part in document.parts:
        shown = [row for row in part.rows if row.reason or any(cell.ours for cell in row.cells)]
        known = dataset in ("", *(cell.dataset for cell in part.rows[0].cells))
        if known and any(cell.ours for row in shown for cell in row.cells):
            left_out = len(part.rows) - len(shown)
            texts.append(_titled(document, part.model_copy(update={"rows": shown})))
            texts += [f"{left_out} of {len(part.rows)} rows have no result yet."] if left_out else []
            texts += [DIFFERENCES] if part.base else []
    return "\n\n".join(texts)


def _titled(document: TableDocument, part: DocumentPart) -> str:
    name = "" if document.table == "flips" else f"Table {document.table}: "
    return f"**{name}{part.title}**\n\n{_markdown(part)}"


def _markdown(part: DocumentPart) -> str:
    cells = part.rows[0].cells
    names = {cell.dataset for cell in cells}
    titles = [
        task_name((cell.way, cell.shot)) if len(names) == 1 else f"{_title(cell)} {task_name((cell.way, cell.shot))}"
        for cell in cells
    ]
    if part.base:
        titles = [text for title in titles for text in (title, f"{title}: difference")]
    lines = [line for row in part.rows for line in _lines(row, part.base)]
    return markdown_table(["system", "settings", *titles, "protocol", "compute"], lines)


def _lines(row: DocumentRow, base: str) -> list[list[str]]:
    """A line of the paper, if it has numbers of the row, and ours. With a base row each task has two columns."""

    def spread(texts: Iterable[str], beside: Iterable[str]) -> list[str]:
        return [text for pair in zip(texts, beside, strict=True) for text in pair] if base else list(texts)

    name, none = f"**{markdown_text(row.name)}**", [""] * len(row.cells)
    ran = [cell for cell in row.cells if cell.ours is not None]
    made = _unique(
        f"{markdown_code(c.settings)}{'' if c.preset_exists else ' (no such preset)'}" for c in row.cells if c.settings
    )
    published = any(cell.paper is not None for cell in row.cells)
    ours = spread(map(_our_text, row.cells), map(_difference_text, row.cells))
    made = made or markdown_text(row.reason)
    line = ["" if published else name, made, *ours, _unique(map(_protocol, ran)), _unique(map(_compute, ran))]
    paper = [name, "paper", *spread(map(_paper_text, row.cells), none), "", ""]
    return [paper, line] if published else [line]


def _title(cell: Cell) -> str:
    return TITLES.get(cell.dataset) or markdown_text(cell.dataset)


def _unique(texts: Iterable[str]) -> str:
    return "; ".join(text for text in dict.fromkeys(texts) if text)


def _paper_text(cell: Cell) -> str:
    if cell.paper is None:
        return ""
    return percent(cell.paper / 100, None if cell.paper_ci95 is None else cell.paper_ci95 / 100)


def _our_text(cell: Cell) -> str:
    if cell.ours is None:
        return "" if cell.status == "no such system" else NOT_RUN
    return percent(cell.ours.accuracy, cell.ours.spread)


def _difference_text(cell: Cell) -> str:
    if cell.difference is None:
        return markdown_text(cell.no_difference)
    assert cell.ours is not None
    paired = cell.difference.trainings
    of = "" if paired == cell.ours.trainings else f" ({paired} of {cell.ours.trainings} trainings)"
    return points(cell.difference.difference, cell.difference.ci95) + of


def _protocol(cell: Cell) -> str:
    ours = cell.ours
    assert ours is not None
    notes = [ours.mode, *([ours.data_split] if ours.data_split else []), f"{ours.episodes:,} episodes"]
    notes += ["checkpoint chosen with validation labels"] if ours.chosen_by_validation else []
    notes += [f"{ours.trainings} trainings"] if ours.trainings > 1 else []
    return ", ".join(map(markdown_text, notes))


def _compute(cell: Cell) -> str:
    """What a result took: steps (`9,000 of 10,000`), costs other than those of the row, time, budget, hardware."""
    ours = cell.ours
    assert ours is not None
    steps = f"{ours.pretrain_steps:,} + " if ours.pretrain_steps else ""
    steps += f"{ours.steps:,}" + (f" of {cell.full_steps:,}" if ours.steps < cell.full_steps else "") + " steps"
    full = cell.full_costs
    other = [
        f"{key}={value} instead of {full[key]}" for key, value in ours.costs.items() if value != full.get(key, value)
    ]
    notes = [steps, *other] + ([f"{ours.seconds:,.0f} s"] if ours.seconds is not None else [])
    notes += [f"budget {ours.budget_s:,.0f} s"] if ours.budget_s is not None else []
    return ", ".join(map(markdown_text, [*notes, ours.hardware] if ours.hardware else notes))
