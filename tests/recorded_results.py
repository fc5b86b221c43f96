"""Result files of a recipe, and what is found of them for the paper's tables."""

import json
from pathlib import Path

from metagmvae.configs.load import load_settings
from metagmvae.evaluation.paper_tables.match_results import read_result_folder, results_of
from metagmvae.evaluation.paper_tables.paper_table import table_document
from metagmvae.evaluation.paper_tables.table_rows import table_parts
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe

RECIPE = Recipe("omniglot-best")
COLUMN = Column("omniglot", 5, 1)


def write(folder: Path, name: str, changes: dict | None = None, settings: dict | None = None) -> None:
    """A result of the recipe; `settings` by dotted name, None: the key is missing, as in an older file."""
    tree = json.loads(load_settings(RECIPE.preset).model_dump_json())
    for dotted, value in (settings or {}).items():
        section, key = dotted.split(".")
        tree[section][key] = value
        if value is None:
            del tree[section][key]
    task = {"way": 5, "shot": 1, "query": 15, "episodes": 1000, "seed": 0, "mode": "transductive"}
    content = {"accuracy": 0.9, "ci95": 0.01, **task, "split": "test", "data_fingerprint": 64 * "1"}
    content |= {"dataset": {"name": "omniglot", "options": {"split": "vinyals"}}}
    content |= {"settings": {key: tree[key] for key in ("model", "adapt", "pretrain", "train")}}
    content |= {"trained": {"stage": "meta", "step": 100, "elapsed_s": 30.0}}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content | (changes or {})))


def found(folder: Path, recipe: Recipe = RECIPE, column: Column = COLUMN, **options) -> list[str]:
    """Names of the files that belong to a cell of a recipe."""
    rows = results_of(read_result_folder(folder), recipe, column, "transductive", **options)
    return [item.file for item, _ in rows]


def best_cell(folder: Path, **options):
    """Table 1, and its cell of our best settings for 5-way 1-shot tasks of Omniglot."""
    document = table_document(1, table_parts(1), read_result_folder(folder), folder, **options)
    row = next(row for row in document.parts[0].rows if row.key == "meta-gmvae-best")
    return document, row.cells[0]
