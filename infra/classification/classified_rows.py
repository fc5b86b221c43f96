"""The rows of `metagmvae classify`, one for each image, and the table file that holds thousands of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError

UNKNOWN = "unknown"
"""The answer for an image of no labelled class."""
FIELDS = ("query", "class", "probabilities")
"""Keys of a row that are no class. The probability of a class with such a name is in `probabilities` only."""
SUFFIXES = (".csv", ".parquet", ".jsonl")
Row = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """What a row holds.

    `query`: name of the file; `class`: the most probable class, `unknown`, or None below the threshold. Then, without
    `top_k`, `probabilities` by class, and each again under the name of its class; with it, `probability` of the class,
    and `class 2`, `probability 2` and so on.
    """

    names: Sequence[str]
    unknown: bool = False
    top_k: int | None = None
    threshold: float = 0.0

    @property
    def answers(self) -> list[str]:
        """The possible classes of an image."""
        return [*self.names, UNKNOWN] if self.unknown else list(self.names)

    def rows(self, files: Sequence[str], p_PK: np.ndarray) -> list[Row]:
        """Return the rows of some images.

        Args:
            files: their names.
            p_PK: probabilities of `answers`.
        """
        return [self._row(file, p_K) for file, p_K in zip(files, p_PK, strict=True)]

    def _row(self, file: str, p_K: np.ndarray) -> Row:
        answers, best = self.answers, int(p_K.argmax())
        row: Row = {"query": file, "class": answers[best] if p_K[best] >= self.threshold else None}
        if self.top_k is None:
            probabilities = dict(zip(answers, p_K.tolist(), strict=True))
            values = {name: value for name, value in probabilities.items() if name not in FIELDS}
            return {**row, **values, "probabilities": probabilities}
        row["probability"] = float(p_K[best])
        for rank, k in enumerate(np.argsort(-p_K, kind="stable")[1 : self.top_k], start=2):
            row |= {f"class {rank}": answers[k], f"probability {rank}": float(p_K[k])}
        return row

    def schema(self) -> pa.Schema:
        """Return the columns of the table: those of the rows, with `probability: CLASS` for each class."""
        columns = [("query", pa.string()), ("class", pa.string())]
        if self.top_k is None:
            return pa.schema([*columns, *((f"probability: {name}", pa.float64()) for name in self.answers)])
        columns.append(("probability", pa.float64()))
        for rank in range(2, min(self.top_k, len(self.answers)) + 1):
            columns += [(f"class {rank}", pa.string()), (f"probability {rank}", pa.float64())]
        return pa.schema(columns)

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Return the rows as a table."""
        flat = [row | {f"probability: {name}": p for name, p in row.get("probabilities", {}).items()} for row in rows]
        return pa.Table.from_pylist(flat, schema=self.schema())


def check_table_name(path: str | Path) -> None:
    """Refuse a table file of another kind.

    Raises:
        DataError: its suffix is none of `SUFFIXES`.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise DataError(f"--table {path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


@contextmanager
def open_table(path: Path, row_format: RowFormat) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Open a table file and yield a function that appends rows. The file appears at the end, complete or not at all.

    A JSON line holds the row as it is; names that are not UTF-8 are refused by the other kinds.

    Raises:
        DataError: the suffix is unknown, or the file cannot be written.
    """
    check_table_name(path)
    with atomic_file(path) as file:
        if path.suffix.lower() == ".jsonl":
            yield lambda rows: file.writelines((json.dumps(_without_copies(row)) + "\n").encode() for row in rows)
            return
        kind = pa.csv.CSVWriter if path.suffix.lower() == ".csv" else pq.ParquetWriter
        with kind(file, row_format.schema()) as writer:
            yield lambda rows: writer.write_table(row_format.table(rows))


def _without_copies(row: Row) -> Row:
    """The row without the probabilities that stand in `probabilities` too."""
    if "probabilities" not in row:
        return row
    return {key: row[key] for key in FIELDS}
