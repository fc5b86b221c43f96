"""The structure of a table of the paper: its columns and rows, and the settings with which each row is trained here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from metagmvae.configs.suggestions import suggestion
from metagmvae.evaluation.comparison.result_files import EvalMode
from metagmvae.pipelines.records import DataError

TableName = int | Literal["flips"]
"""Number in the paper; `flips`: the differences between the paper and its published code, each alone."""


def parse_table_name(text: str) -> TableName | None:
    """Return the name of a table of the paper; None for any other text."""
    if text == "flips":
        return "flips"
    return int(text) if text.isdecimal() else None


class Column(NamedTuple):
    """The tasks of a column: a cell of a table is the accuracy of a row on them."""

    dataset: str
    way: int
    shot: int


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, and what of it is evaluated."""

    preset: str
    overrides: tuple[str, ...] = ()
    """Changes of the preset for the training, as for `--set`."""
    adapt: tuple[str, ...] = ()
    """Changes of `adapt` for the evaluation; models that differ only in these are trained once."""
    baseline: str = ""
    """Name of the baseline on the features of this model that the row reports; empty: the model itself."""

    @property
    def label(self) -> str:
        """The preset and its changes, in one line."""
        name = " ".join([self.preset, *self.overrides, *self.adapt])
        return f"{self.baseline} on the features of {name}" if self.baseline else name


@dataclass(frozen=True)
class TableRow:
    """One system."""

    key: str
    name: str
    mode: EvalMode
    """How it is evaluated here: each query alone (inductive), or the queries of an episode together."""
    paper: Mapping[Column, float]
    """Accuracies of the paper in percent; a column without one is missing."""
    paper_ci95: Mapping[Column, float]
    """Half widths of its 95% intervals in percent, where the paper prints them."""
    recipes: Mapping[Column, Recipe]
    """How it is trained for each column; a column without a recipe has no such system."""
    reason: str = ""
    """Why there is no recipe for any column, where that is not evident."""


@dataclass(frozen=True)
class TablePart:
    """Rows with the same columns."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    base: TableRow | None = None
    """The row to which the others are compared on the same episodes; all rows are trained for equally many steps."""


def select_rows(parts: Sequence[TablePart], keys: Sequence[str]) -> tuple[TablePart, ...]:
    """Return the parts with only the rows of these keys; without keys all rows.

    Raises:
        DataError: no row has one of the keys.
    """
    known = list(dict.fromkeys(row.key for part in parts for row in part.rows))
    for key in keys:
        if key not in known:
            raise DataError(f"--rows {key}: no such row{suggestion(key, known)}")
    kept = (replace(part, rows=tuple(row for row in part.rows if not keys or row.key in keys)) for part in parts)
    return tuple(part for part in kept if part.rows)


def select_columns(
    parts: Sequence[TablePart], ways: Sequence[int] = (), shots: Sequence[int] = ()
) -> tuple[TablePart, ...]:
    """Return the parts with only the columns of these numbers of classes and of shots; without numbers all columns.

    Raises:
        DataError: no column has one of the numbers, or no row has a column of them.
    """
    columns = {column for part in parts for column in part.columns}
    for option, numbers, known in (
        ("--ways", ways, {c.way for c in columns}),
        ("--shots", shots, {c.shot for c in columns}),
    ):
        if unknown := [number for number in numbers if number not in known]:
            remedy = " or ".join(map(str, sorted(known)))
            raise DataError(f"{option} {unknown[0]}: the table has no such column; give {remedy}")
    if not ways and not shots:
        return tuple(parts)
    kept = []
    for part in parts:
        chosen = tuple(c for c in part.columns if (not ways or c.way in ways) and (not shots or c.shot in shots))
        rows = (
            replace(row, recipes={column: recipe for column, recipe in row.recipes.items() if column in chosen})
            for row in part.rows
        )
        kept.append(replace(part, columns=chosen, rows=tuple(row for row in rows if row.recipes or row.reason)))
    left = tuple(part for part in kept if part.columns and part.rows)
    if not left:
        raise DataError("--ways, --shots: no row has a column of these numbers; give others, or leave one out")
    return left
