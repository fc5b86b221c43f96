"""A table of the paper on a Markdown page, from the marker `<!-- paper-table:1,budget=120,data=omniglot,ways=5 -->`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError, field_validator

from metagmvae.evaluation.comparison.result_files import Budget
from metagmvae.evaluation.paper_tables.match_results import read_result_folder
from metagmvae.evaluation.paper_tables.paper_table import table_document
from metagmvae.evaluation.paper_tables.table_layout import markdown_results
from metagmvae.evaluation.paper_tables.table_rows import table_parts
from metagmvae.evaluation.paper_tables.table_structure import parse_table_name, select_columns
from metagmvae.pipelines.records import DataError


class _Options(BaseModel, extra="forbid"):
    """What stands behind the name of the table in a marker."""

    budget: Budget | None = None
    """Only results with this budget in seconds; None: all."""
    data: str = ""
    """Name of a dataset; empty: all."""
    ways: list[int] = []
    """Only columns of these numbers of classes, separated by `+`; empty: all."""

    @field_validator("ways", mode="before")
    @classmethod
    def _split(cls, text: str) -> list[str]:
        return text.split("+")


def page_table(results: Path, marker: str) -> str:
    """Return the rows of a table that have results, and below the number of those that have none.

    Args:
        results: folder of the result files.
        marker: name of the table and options, separated by commas: `1,budget=120,data=omniglot,ways=5`.

    Raises:
        DataError: there is no such table, option or number of classes, or no result.
    """
    name, *words = marker.split(",")
    try:
        options = _Options.model_validate(dict(word.partition("=")[::2] for word in words))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"paper-table:{marker}: {key}: {first['msg']}; options are budget=SECONDS, data=NAME and ways=K+K"
        ) from error
    table = parse_table_name(name)
    if table is None:
        raise DataError(f"paper-table:{marker}: no such table; give 1, 2, 10 or flips")
    parts = select_columns(table_parts(table), options.ways)
    document = table_document(table, parts, read_result_folder(results), results, budget_s=options.budget)
    text = markdown_results(document, options.data)
    if not text:
        raise DataError(f"paper-table:{marker}: no row has a result; record one, or remove the marker")
    return text
