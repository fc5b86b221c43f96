"""Renders the tables of README.md and evaluation/results/README.md from the recorded results, between markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from metagmvae.evaluation.comparison import record_tables
from metagmvae.evaluation.comparison.preset_table import preset_table
from metagmvae.evaluation.comparison.results_table import paired_table, results_table, summary_table
from metagmvae.pipelines.files import atomic_file
from metagmvae.pipelines.records import DataError

PAGES = ("README.md", "evaluation/results/README.md")

TABLES: dict[str, Callable[[Path, str], str]] = {
    "table": lambda results, names: results_table(results, names.split(",")),
    "summary": summary_table,
    "ablation": record_tables.ablation_table,
    "bench": record_tables.bench_table,
    "curve": record_tables.curve_table,
    "presets": preset_table,
    "paired": paired_table,
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
