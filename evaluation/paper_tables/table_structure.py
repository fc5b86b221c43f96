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
    """A cell of a table is the accuracy of a row on the tasks of a column."""

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


def select_ways(parts: Sequence[TablePart], ways: Sequence[int]) -> tuple[TablePart, ...]:
    """Return the parts with only the columns of these numbers of classes; without numbers all columns.

    Raises:
        DataError: no column has one of the numbers.
    """
    known = sorted({column.way for part in parts for column in part.columns})
    if unknown := [way for way in ways if way not in known]:
        raise DataError(f"--ways {unknown[0]}: the table has no such column; give {' or '.join(map(str, known))}")
    if not ways:
        return tuple(parts)
    kept = []
    for part in parts:
        columns = tuple(column for column in part.columns if column.way in ways)
        rows = (
            replace(row, recipes={column: recipe for column, recipe in row.recipes.items() if column in columns})
            for row in part.rows
        )
        kept.append(replace(part, columns=columns, rows=tuple(row for row in rows if row.recipes or row.reason)))
    return tuple(part for part in kept if part.columns and part.rows)
