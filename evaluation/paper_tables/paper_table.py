"""A table of the paper with our recorded results beside its numbers, as a JSON document and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from metagmvae.evaluation.comparison.formatting import markdown_code, markdown_table, markdown_text, percent, task_name
from metagmvae.evaluation.comparison.result_files import Count, Fraction, HalfWidth, RecordedAccuracy, RecordedDataset
from metagmvae.evaluation.comparison.results_table import OMNIGLOT_SPLITS, TITLES
from metagmvae.evaluation.paper_tables.match_results import (
    FoundResult,
    ResultFolder,
    near_results,
    recipe_settings,
    results_of,
)
from metagmvae.evaluation.paper_tables.table_rows import Column, TablePart, TableRow

NOT_RUN = "not run"
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Found = tuple[FoundResult, RecordedAccuracy]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OurResult(_Part):
    """Our accuracy of a cell: of one training, or the mean over trainings with different seeds."""

    accuracy: Fraction
    spread: HalfWidth | None
    """Half width of the 95% interval over episodes; of several trainings their standard deviation."""
    trainings: Count
    mode: str
    split: str
    query: Count
    episodes: Count
    data_split: str
    """Split of Omniglot's classes; empty for other datasets."""
    chosen_by_validation: bool
    """Whether the checkpoint was chosen with labelled validation classes."""
    pretrain_steps: int
    """Steps of the training of the encoder, in the same run or before; 0: none."""
    steps: int
    """Steps of meta-training."""
    seconds: float | None
    """Of the training, mean over trainings; None: not recorded."""
    budget_s: float | None
    hardware: str
    files: list[str]


class Cell(_Part):
    """One accuracy of the paper beside ours."""

    dataset: str
    way: Count
    shot: Count
    paper: Percent | None
    paper_ci95: Percent | None
    settings: str
    """Preset and its changes; empty: there is no such system for this dataset."""
    preset_exists: bool
    full_steps: int
    """Steps of meta-training in the preset; 0: none, or there is no such preset."""
    status: Literal["run", "not run", "no such system"]
    ours: OurResult | None


class DocumentRow(_Part):
    """One system."""

    key: str
    name: str
    cells: list[Cell]


class DocumentPart(_Part):
    """Rows with the same columns."""

    title: str
    rows: list[DocumentRow]


class TableDocument(_Part):
    """What `metagmvae table NUMBER --json` prints under `document`."""

    table: Count
    results: str
    budget_s: float | None
    """Only results with this budget are shown; None: all."""
    other_files: list[str]
    """Files of the folder that hold no accuracy of a model."""
    near: list[str]
    """Results that belong to no row because of a single setting."""
    cells: int
    not_run: int
    parts: list[DocumentPart]


def table_document(
    number: int,
    parts: Sequence[TablePart],
    folder: ResultFolder,
    results: Path,
    data: Sequence[RecordedDataset] = (),
    budget_s: float | None = None,
) -> TableDocument:
    """Find the result of every cell.

    Args:
        number: of the table.
        parts: its rows.
        folder: content of `results`.
        results: folder of the result files.
        data: the only datasets whose results count; empty: all.
        budget_s: only results with this budget; None: all.
    """

    def cell(row: TableRow, column: Column) -> Cell:
        recipe = row.recipes.get(column)
        found = results_of(folder, recipe, column, row.mode, data, budget_s) if recipe else []
        ours = _ours(found) if found else None
        settings = recipe_settings(recipe) if recipe else None
        return Cell(
            dataset=column.dataset,
            way=column.way,
            shot=column.shot,
            paper=row.paper.get(column),
            paper_ci95=row.paper_ci95.get(column),
            settings=recipe.label if recipe else "",
            preset_exists=settings is not None,
            full_steps=settings.train.steps if settings else 0,
            status="no such system" if recipe is None else "not run" if ours is None else "run",
            ours=ours,
        )

    documents = [
        DocumentPart(
            title=part.title,
            rows=[
                DocumentRow(key=row.key, name=row.name, cells=[cell(row, column) for column in part.columns])
                for row in part.rows
            ],
        )
        for part in parts
    ]
    statuses = [cell.status for part in documents for row in part.rows for cell in row.cells]
    return TableDocument(
        table=number,
        results=str(results),
        budget_s=budget_s,
        other_files=list(folder.other_files),
        near=near_results(folder, parts),
        cells=len(statuses) - statuses.count("no such system"),
        not_run=statuses.count("not run"),
        parts=documents,
    )


def _ours(found: Sequence[Found]) -> OurResult:
    """Take the longest training, of equally long ones that with the most episodes and the latest; all its seeds."""

    def rank(item: Found) -> tuple[int, int, int]:
        return _pretrain_steps(item[0]), int(item[0].result.trained.get("step", 0)), item[1].episodes

    best = max(map(rank, found))
    latest = max((item for item in found if rank(item) == best), key=lambda item: item[0].result.when)
    by_seed = {
        _seed(item): item
        for item in sorted(found, key=lambda item: item[0].result.when)
        if rank(item) == best and item[0].result.images == latest[0].result.images
    }
    rows = [row for _, row in by_seed.values()]
    results = [item.result for item, _ in by_seed.values()]
    seconds = [result.trained["elapsed_s"] for result in results if "elapsed_s" in result.trained]
    accuracies = [row.accuracy for row in rows]
    split = str(results[0].images.options.get("split", ""))
    return OurResult(
        accuracy=statistics.fmean(accuracies),
        spread=rows[0].ci95 if len(rows) == 1 else statistics.stdev(accuracies),
        trainings=len(rows),
        mode=rows[0].mode,
        split=results[0].split,
        query=rows[0].query,
        episodes=rows[0].episodes,
        data_split=OMNIGLOT_SPLITS.get(split, split),
        chosen_by_validation=any(result.trained.get("selected_by") for result in results),
        pretrain_steps=best[0],
        steps=best[1],
        seconds=statistics.fmean(seconds) if seconds else None,
        budget_s=results[0].budget_s,
        hardware=_hardware(results[0].environment),
        files=[item.file for item, _ in by_seed.values()],
    )


def _seed(item: Found) -> int:
    return int((item[0].result.settings.get("train") or {}).get("seed", 0))


def _pretrain_steps(item: FoundResult) -> int:
    """Steps of the training of the encoder; those of a run on stored features are recorded with its encoder."""
    trained = item.result.encoder.get("trained") or {}
    recorded = (item.result.settings.get("pretrain") or {}).get("steps") or (trained.get("pretrain") or {}).get("steps")
    return int(recorded or 0)


def _hardware(environment: dict[str, object]) -> str:
    """GPU, or cores and name of the processor, as recorded by the evaluation."""
    if environment.get("gpu"):
        return str(environment["gpu"])
    cores, processor = environment.get("cores"), environment.get("processor")
    return f"{cores or '?'} cores, {processor}" if processor else ""


def markdown_document(document: TableDocument) -> str:
    """Lay out the parts of a document as Markdown tables; of each system one line of the paper and one of ours."""
    tables = [f"**Table {document.table}: {part.title}**\n\n{_markdown(part)}" for part in document.parts]
    shown = "all results" if document.budget_s is None else f"results with a budget of {document.budget_s:,.0f} s"
    note = (
        "Accuracy in percent ± its 95% interval over episodes, or ± the standard deviation over trainings. "
        f"Ours: {shown} in {markdown_text(document.results)}; {document.not_run} of {document.cells} are not run."
    )
    near = [f"Not shown: {markdown_text(line)}." for line in document.near]
    return "\n\n".join([*tables, note, *near])


def _markdown(part: DocumentPart) -> str:
    cells = part.rows[0].cells
    names = {cell.dataset for cell in cells}
    titles = [
        task_name((cell.way, cell.shot)) if len(names) == 1 else f"{_title(cell)} {task_name((cell.way, cell.shot))}"
        for cell in cells
    ]
    lines = []
    for row in part.rows:
        lines.append([f"**{markdown_text(row.name)}**", "paper", *map(_paper_text, row.cells), "", ""])
        ran = [cell for cell in row.cells if cell.ours is not None]
        made = _unique(
            f"{markdown_code(c.settings)}{'' if c.preset_exists else ' (no such preset)'}" for c in row.cells
        )
        lines.append(["", made, *map(_our_text, row.cells), _unique(map(_protocol, ran)), _unique(map(_compute, ran))])
    return markdown_table(["system", "settings", *titles, "protocol", "compute"], lines)


def _title(cell: Cell) -> str:
    return TITLES.get(cell.dataset) or markdown_text(cell.dataset)


def _unique(texts: Iterable[str]) -> str:
    return "; ".join(text for text in dict.fromkeys(texts) if text)


def _settings_text(cell: Cell) -> str:
    if not cell.settings:
        return ""
    return markdown_code(cell.settings) + ("" if cell.preset_exists else " (no such preset or setting)")


def _paper_text(cell: Cell) -> str:
    if cell.paper is None:
        return ""
    return percent(cell.paper / 100, None if cell.paper_ci95 is None else cell.paper_ci95 / 100)


def _our_text(cell: Cell) -> str:
    if cell.ours is None:
        return "" if cell.status == "no such system" else NOT_RUN
    return percent(cell.ours.accuracy, cell.ours.spread)


def _protocol(cell: Cell) -> str:
    ours = cell.ours
    assert ours is not None
    notes = [ours.mode, *([ours.data_split] if ours.data_split else []), f"{ours.episodes:,} episodes"]
    notes += ["checkpoint chosen with validation labels"] if ours.chosen_by_validation else []
    notes += [f"{ours.trainings} trainings"] if ours.trainings > 1 else []
    return ", ".join(map(markdown_text, notes))


def _compute(cell: Cell) -> str:
    """Steps of pre-training and meta-training, the latter of how many, then seconds, budget and hardware."""
    ours = cell.ours
    assert ours is not None
    steps = f"{ours.pretrain_steps:,} + " if ours.pretrain_steps else ""
    steps += f"{ours.steps:,}" + (f" of {cell.full_steps:,}" if ours.steps < cell.full_steps else "") + " steps"
    notes = [steps] + ([f"{ours.seconds:,.0f} s"] if ours.seconds is not None else [])
    notes += [f"budget {ours.budget_s:,.0f} s"] if ours.budget_s is not None else []
    return ", ".join(map(markdown_text, [*notes, ours.hardware] if ours.hardware else notes))
