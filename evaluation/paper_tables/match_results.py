"""Finds the recorded results of a row of the paper's tables by the settings in the result files, not by file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from metagmvae.configs.load import SettingsError, flatten, load_settings
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.result_files import (
    RecordedAccuracy,
    RecordedDataset,
    RecordedResult,
    check_results_folder,
    read_results,
)
from metagmvae.evaluation.paper_tables.table_rows import paper_tables
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe, TablePart
from metagmvae.pipelines.files import read_json

NOT_COMPARED = ("name", "data", "validation", "run", "tracking")
"""Sections that do not change the trained model of a row."""
FREE_SETTINGS = (
    "pretrain.steps",
    "train.steps",
    "train.seed",
    "method.partitions",
    "train.decode_samples",
    "train.precision",
    "train.channels_last",
    "train.compile",
    "train.checkpoint_every",
    "train.log_every",
)
"""Settings that may differ between a result and its row: the length of the training, its seed and its cost.

Decoding R of the N samples estimates the same expected loss without bias, at a fraction of the cost.
"""
COST_SETTINGS = ("method.partitions", "train.decode_samples", "train.precision")
"""Those of them that change the variance or the rounding of a step; tables name them where they are not the row's."""
WITHOUT_TASKS = ("meta-gmvae", "scratch")
"""Methods that are not trained on few-shot tasks."""
SPLIT, QUERY = "test", 15
"""Classes and queries per class of the paper's evaluation."""


@dataclass(frozen=True)
class FoundResult:
    """A recorded result of one task."""

    path: Path
    result: RecordedResult
    flat: dict[str, Any] = field(repr=False)
    """Its settings, as `matched_settings` returns them."""
    costs: dict[str, Any] = field(repr=False)
    """Its values of `COST_SETTINGS`."""

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int((self.result.settings.get("train") or {}).get("seed", 0))

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of pre-training and meta-training; the former are recorded with the encoder of a run on features."""
        trained = self.result.encoder.get("trained") or {}
        pretrain = (self.result.settings.get("pretrain") or {}).get("steps")
        return int(pretrain or (trained.get("pretrain") or {}).get("steps") or 0), int(
            self.result.trained.get("step", 0)
        )


@dataclass(frozen=True)
class ResultFolder:
    """The results in a folder of JSON files."""

    results: tuple[FoundResult, ...]
    other_files: tuple[str, ...]
    """Files that hold no few-shot accuracy of a model, such as those of `metagmvae bench`."""


def read_result_folder(folder: Path) -> ResultFolder:
    """Read the result files of a folder.

    Raises:
        DataError: there is no such folder, or a file is no JSON or a damaged result.
    """
    check_results_folder(folder)
    found, others = [], []
    for path in sorted(folder.glob("*.json")):
        if not _is_result(read_json(path)):
            others.append(path.name)
            continue
        for result in read_results(path):
            tree = result.settings
            # The pre-training of a model that was trained on stored features, if it is recorded.
            pretrain = (result.encoder.get("trained") or {}).get("pretrain")
            if not (tree.get("pretrain") or {}).get("steps") and isinstance(pretrain, dict):
                tree = tree | {"pretrain": pretrain}
            found.append(FoundResult(path, result, matched_settings(tree), cost_settings(tree)))
    return ResultFolder(tuple(found), tuple(others))


def _is_result(content: Any) -> bool:
    """Whether a file holds accuracies of a model with its settings; those of `--open` are of other tasks."""
    if not isinstance(content, dict) or not {"split", "settings", "data_fingerprint"} <= content.keys():
        return False
    rows = content.get("rows") or [content]
    return all(isinstance(row, dict) and "accuracy" in row and "open_classes" not in row for row in rows)


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    return dict(flatten(Settings().model_dump(mode="json")))


def matched_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten settings, fill in the keys that an older file does not have, and leave out those that may differ.

    Without pre-training its settings are left out.
    """
    flat = _defaults() | dict(flatten(dict(tree)))
    pretrained = bool(flat["pretrain.steps"])
    kept = {
        key: value
        for key, value in flat.items()
        if key.partition(".")[0] not in NOT_COMPARED
        and key not in FREE_SETTINGS
        and (pretrained or not key.startswith("pretrain."))
    }
    return kept | {"pretrained": pretrained}


def cost_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `COST_SETTINGS`; None for those that the method does not use.

    Those that an older file does not have are the defaults.
    """
    flat = _defaults() | dict(flatten(dict(tree)))
    method = flat["method.name"]
    used = {
        "method.partitions": method not in WITHOUT_TASKS and flat["method.tasks"] == "clusters",
        "train.decode_samples": method == "meta-gmvae",
    }
    return {key: flat[key] if used.get(key, True) else None for key in COST_SETTINGS}


@lru_cache(maxsize=256)
def recipe_settings(recipe: Recipe) -> Settings | None:
    """Return the settings of a recipe at evaluation; None if there is no such preset or setting (yet)."""
    try:
        return load_settings(recipe.preset, [*recipe.overrides, *recipe.adapt])
    except SettingsError:
        return None


def differing_keys(recipe: Recipe, flat: Mapping[str, Any]) -> list[str] | None:
    """Return the matched settings in which a model differs from a recipe; None if there is no such preset.

    A recipe without pre-training is of features, whose encoder may be trained in any way.
    """
    settings = recipe_settings(recipe)
    if settings is None:
        return None
    wanted = matched_settings(settings.model_dump(mode="json"))
    keys = wanted.keys() | flat.keys()
    if not wanted["pretrained"]:
        keys = {key for key in keys if not key.startswith("pretrain")}
    return sorted(key for key in keys if wanted.get(key) != flat.get(key))


def results_of(
    folder: ResultFolder,
    recipe: Recipe,
    column: Column,
    mode: str,
    data: Sequence[RecordedDataset] = (),
    budget_s: float | None = None,
) -> list[tuple[FoundResult, RecordedAccuracy]]:
    """Return the results of a cell, each with the accuracy that counts: that of the model or of a baseline on it.

    Args:
        folder: recorded results.
        recipe: settings of the row.
        column: dataset and task.
        mode: transductive or inductive.
        data: the only datasets (name and options, such as the split of the classes); empty: all of that name.
        budget_s: only results with this budget; None: all.
    """
    found = []
    for item in folder.results:
        result = item.result
        task = (result.images.name, result.way, result.shot)
        special = result.unbalanced or result.dirichlet is not None or result.query != QUERY
        if task != column or result.split != SPLIT or special:
            continue
        if (data and result.images not in data) or (budget_s is not None and result.budget_s != budget_s):
            continue
        rows: list[RecordedAccuracy] = [result]
        if recipe.baseline:
            rows = [row for row in result.baselines if row.baseline == recipe.baseline]
        if differing_keys(recipe, item.flat) == []:
            found += [(item, row) for row in rows if row.mode == mode]
    return found


def near_results(folder: ResultFolder, parts: Sequence[TablePart]) -> list[str]:
    """Return a line for each file that belongs to no row of any table, if a single setting is the reason: which one."""
    recipes = {recipe for part in parts for row in part.rows for recipe in row.recipes.values()}
    datasets = {column.dataset for part in parts for column in part.columns}
    lines: dict[str, None] = {}
    for item in folder.results:
        if item.result.images.name not in datasets or item.result.split != SPLIT:
            continue
        differences = {recipe: differing_keys(recipe, item.flat) for recipe in recipes}
        near = any(keys is not None and len(keys) == 1 for keys in differences.values())
        if [] in differences.values() or not near or any(differing_keys(r, item.flat) == [] for r in _all_recipes()):
            continue
        for recipe, keys in sorted(differences.items(), key=lambda pair: pair[0].label):
            if keys is not None and len(keys) == 1 and not keys[0].startswith("adapt."):
                lines[f"{item.file} is not of {recipe.label}: {keys[0]} is {item.flat.get(keys[0])}"] = None
    return list(lines)


@lru_cache(maxsize=1)
def _all_recipes() -> tuple[Recipe, ...]:
    parts = (part for table in paper_tables().values() for part in table)
    return tuple({recipe: None for part in parts for row in part.rows for recipe in row.recipes.values()})
