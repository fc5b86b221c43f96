"""A table of the paper with our recorded results beside its numbers, as a JSON document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.result_files import Count, RecordedDataset
from metagmvae.evaluation.paper_tables.match_results import (
    ResultFolder,
    cost_settings,
    near_results,
    recipe_settings,
    results_of,
)
from metagmvae.evaluation.paper_tables.our_results import (
    Difference,
    DocumentModel,
    Found,
    OurResult,
    chosen_trainings,
    difference_to_base,
    our_result,
)
from metagmvae.evaluation.paper_tables.table_structure import Column, TableName, TablePart, TableRow

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Cell(DocumentModel):
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
    full_costs: dict[str, Any]
    """Settings of the preset that change cost or variance of a step, as in `ours.costs`."""
    status: Literal["run", "not run", "no such system"]
    ours: OurResult | None
    difference: Difference | None = None
    """To the base row of the table, if it has one."""
    no_difference: str = ""
    """Why there is a result without a difference."""


class DocumentRow(DocumentModel):
    """One system."""

    key: str
    name: str
    reason: str = ""
    """Why there is no such system; empty where it is evident."""
    cells: list[Cell]


class DocumentPart(DocumentModel):
    """Rows with the same columns."""

    title: str
    base: str = ""
    """Key of the row that the others are compared with; empty: none."""
    rows: list[DocumentRow]


class TableDocument(DocumentModel):
    """What `metagmvae table NAME --json` prints under `document`."""

    table: TableName
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
    name: TableName,
    parts: Sequence[TablePart],
    folder: ResultFolder,
    results: Path,
    data: Sequence[RecordedDataset] = (),
    budget_s: float | None = None,
) -> TableDocument:
    """Find the result of every cell.

    `folder` is the content of `results`. Only results on the datasets of `data`, and with the budget, count; empty or
    None: all.
    """
    find = partial(results_of, folder, data=data, budget_s=budget_s)
    documents = [
        DocumentPart(
            title=part.title,
            base=part.base.key if part.base else "",
            rows=[
                DocumentRow(
                    key=row.key,
                    name=row.name,
                    reason=row.reason,
                    cells=[_cell(find, row, column, part.base) for column in part.columns],
                )
                for row in part.rows
            ],
        )
        for part in parts
    ]
    statuses = [cell.status for part in documents for row in part.rows for cell in row.cells]
    return TableDocument(
        table=name,
        results=str(results),
        budget_s=budget_s,
        other_files=list(folder.other_files),
        near=near_results(folder, parts),
        cells=len(statuses) - statuses.count("no such system"),
        not_run=statuses.count("not run"),
        parts=documents,
    )


def _cell(find: Callable[..., list[Found]], row: TableRow, column: Column, base: TableRow | None) -> Cell:
    """A cell with the results that `find` returns for a recipe, a column and a mode."""
    recipe = row.recipes.get(column)
    found = find(recipe, column, row.mode) if recipe else []
    trainings = chosen_trainings(found) if found else []
    compared: Difference | str = ""
    if trainings and base is not None and base.key != row.key:
        base_recipe = base.recipes.get(column)
        of_base = find(base_recipe, column, base.mode) if base_recipe else []
        compared = difference_to_base([item for item, _ in trainings], [item for item, _ in of_base])
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
        full_costs=_costs(settings) if settings else {},
        status="no such system" if recipe is None else "run" if trainings else "not run",
        ours=our_result(trainings) if trainings else None,
        difference=None if isinstance(compared, str) else compared,
        no_difference=compared if isinstance(compared, str) else "",
    )


def _costs(settings: Settings) -> dict[str, Any]:
    costs = cost_settings(settings.model_dump(mode="json"))
    return {key: value for key, value in costs.items() if value is not None}
