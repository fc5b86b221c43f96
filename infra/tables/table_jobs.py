"""What `metagmvae table --run` has to do: the trainings and evaluations whose results are missing, cheapest first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from metagmvae.configs.load import SettingsError, load_settings, presets
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.result_files import EvalMode
from metagmvae.evaluation.paper_tables.match_results import (
    FoundResult,
    ResultFolder,
    cost_settings,
    matched_settings,
    results_of,
)
from metagmvae.evaluation.paper_tables.table_structure import Column, Recipe, TablePart, TableRow
from metagmvae.infra.tables.table_request import GivenData, TableRequest
from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.methods_by_name import find_method

MAX_NAME = 150
"""Longest name of a training, in characters; those of its result files are longer, and file systems allow 255."""


@dataclass(frozen=True)
class Evaluation:
    """One task of one trained model."""

    adapt: tuple[str, ...]
    mode: EvalMode
    baselines: bool
    way: int
    shot: int

    @property
    def suffix(self) -> str:
        """End of the name of the result file."""
        parts = [*self.adapt, *(["inductive"] if self.mode == "inductive" else []), *(["baselines"] * self.baselines)]
        return "".join(f"-{_slug(part)}" for part in parts) + f"-{self.way}way-{self.shot}shot.json"


class TableCell(NamedTuple):
    """A row at a column, for which there is a recipe."""

    row: TableRow
    column: Column
    recipe: Recipe
    paired: bool
    """Whether its table compares the accuracies of the episodes with those of a base row."""


class PlannedSteps(NamedTuple):
    """Steps of a training, and after how many a checkpoint is written."""

    pretrain: int
    meta: int
    checkpoint_every: int


@dataclass(frozen=True)
class TableJob:
    """One training, and the evaluations of it that are missing."""

    name: str
    preset: str
    overrides: tuple[str, ...]
    """Of the row and of `--set`."""
    data: str
    run_dir: Path
    results: Path
    budget_s: float
    episodes: int
    cost: int
    """Images that the full schedule of the preset reads; the order of the jobs."""
    rows: tuple[str, ...] = ()
    """Names of the systems that need it."""
    evaluations: tuple[Evaluation, ...] = ()
    steps: PlannedSteps | None = None
    """None: as many as take the budget."""


@dataclass(frozen=True)
class JobList:
    """The jobs, and what cannot be run."""

    jobs: tuple[TableJob, ...]
    left_out: tuple[dict[str, str], ...]
    """Rows whose dataset was not given."""
    failed: tuple[dict[str, str], ...]
    """Rows whose settings cannot be used."""
    done: int
    """Results of cells, one for each seed, that exist already."""


def plan_jobs(
    parts: Sequence[TablePart], folder: ResultFolder, given: Sequence[GivenData], request: TableRequest
) -> JobList:
    """Collect what has no result with this budget, seed and data; trainings that several rows share appear once.

    The jobs are in the order of the seeds, so that there is a training of each row first, and then of their cost.
    """
    seeds: list[tuple[str, ...]] = [(f"train.seed={seed}",) for seed in request.seeds] or [()]
    plans = [
        _plan_seed(parts, folder, given, replace(request, overrides=(*request.overrides, *seed))) for seed in seeds
    ]
    return replace(
        plans[0], jobs=tuple(job for plan in plans for job in plan.jobs), done=sum(plan.done for plan in plans)
    )


def _plan_seed(
    parts: Sequence[TablePart], folder: ResultFolder, given: Sequence[GivenData], request: TableRequest
) -> JobList:
    jobs: dict[str, TableJob] = {}
    left_out: dict[tuple[str, str], dict[str, str]] = {}
    failed: dict[tuple[str, str], dict[str, str]] = {}
    done = 0
    for cell in _cells(parts):
        row, column, recipe, paired = cell
        label = {"system": row.name, "settings": recipe.label}
        key = (row.key, recipe.label)
        if all(g.images.name != column.dataset for g in given):
            left_out[key] = label | {"reason": f"no dataset of {column.dataset} is given"}
            continue
        try:
            if recipe.preset not in presets() and not Path(recipe.preset).is_file():
                raise SettingsError("there is no such preset")
            settings = load_settings(recipe.preset, [*recipe.overrides, *recipe.adapt, *request.overrides])
            kind = _data_kind(settings)
            cost = _cost(settings)
        except (SettingsError, DataError) as error:
            failed[key] = label | {"reason": str(error)}
            continue
        data = next((g for g in given if (g.images.name, g.dataset.kind) == (column.dataset, kind)), None)
        if data is None:
            left_out[key] = label | {"reason": f"needs a dataset of {kind} of {column.dataset}: give it with --data"}
            continue
        recorded = recorded_results(folder, cell, data, request, settings)
        if any(_is_enough(item, request, settings.train.seed, paired) for item in recorded):
            done += 1
            continue
        evaluation = Evaluation(recipe.adapt, row.mode, bool(recipe.baseline), column.way, column.shot)
        training = _training_key(settings, data.dataset.fingerprint)
        job = jobs.get(training) or _new_job(recipe, settings, data.dataset, cost, request)
        rows = tuple(dict.fromkeys((*job.rows, row.name)))
        evaluations = tuple(dict.fromkeys((*job.evaluations, evaluation)))
        jobs[training] = replace(job, rows=rows, evaluations=evaluations)
    ordered = sorted(jobs.values(), key=lambda job: job.cost)
    return JobList(tuple(ordered), tuple(left_out.values()), tuple(failed.values()), done)


def _cells(parts: Sequence[TablePart]) -> Iterator[TableCell]:
    for part in parts:
        for row in part.rows:
            yield from (TableCell(row, column, recipe, part.base is not None) for column, recipe in row.recipes.items())


def _data_kind(settings: Settings) -> str:
    """Whether the training reads images, or features because its encoder must have been trained before."""
    needs_encoder = find_method(settings.method).needs_encoder(settings)
    return "features" if needs_encoder and not settings.pretrain.steps else "images"


def _cost(settings: Settings) -> int:
    meta = settings.train.steps * find_method(settings.method).images_per_step(settings)
    return settings.pretrain.steps * settings.pretrain.batch + meta


def recorded_results(
    folder: ResultFolder, cell: TableCell, data: GivenData, request: TableRequest, settings: Settings
) -> list[FoundResult]:
    """Return the results of a cell on this data, with this budget and with the costs that `--set` names.

    `settings` are those of the row, with the changes of the request.
    """
    costs = cost_settings(settings.model_dump(mode="json"))
    named = [key for key in costs if any(text.partition("=")[0].strip() == key for text in request.overrides)]
    return [
        item
        for item, _ in results_of(folder, cell.recipe, cell.column, cell.row.mode, [data.images], request.budget_s)
        if item.result.data_fingerprint == data.dataset.fingerprint
        and all(item.costs[key] == costs[key] for key in named)
    ]


def recorded_steps(
    parts: Sequence[TablePart], folder: ResultFolder, given: Sequence[GivenData], request: TableRequest
) -> PlannedSteps | None:
    """Return the steps that the trainings of tables with a base row have, from a result; None: there is none yet."""
    with_base = [replace(part, rows=(part.base, *part.rows)) for part in parts if part.base]
    for cell in _cells(with_base):
        settings = load_settings(cell.recipe.preset, [*cell.recipe.overrides, *cell.recipe.adapt, *request.overrides])
        for data in given:
            for item in recorded_results(folder, cell, data, request, settings):
                tree = item.result.settings
                return PlannedSteps(
                    tree["pretrain"]["steps"], tree["train"]["steps"], tree["train"]["checkpoint_every"]
                )
    return None


def _is_enough(item: FoundResult, request: TableRequest, seed: int, paired: bool) -> bool:
    """Whether a result is of this seed and enough episodes, whose accuracies are recorded if they are compared."""
    return (
        item.seed == seed
        and (item.result.most_episodes or item.result.episodes) >= request.episodes
        and (not paired or item.path.with_suffix(".parquet").is_file())
    )


def _training_key(settings: Settings, data_fingerprint: str) -> str:
    """Equal for rows that are evaluations of the same training."""
    flat = matched_settings(settings.model_dump(mode="json"))
    trained = {key: value for key, value in flat.items() if not key.startswith("adapt.")}
    return sha256_json([trained, settings.pretrain.steps, settings.train.steps, settings.train.seed, data_fingerprint])


def _new_job(recipe: Recipe, settings: Settings, dataset: Dataset, cost: int, request: TableRequest) -> TableJob:
    preset = load_settings(recipe.preset, recipe.overrides)
    ours, theirs = (cost_settings(each.model_dump(mode="json")) for each in (settings, preset))
    costs = "".join(f"-{_slug(f'{key}-{ours[key]}')}" for key in ours if ours[key] != theirs[key])
    training = f"-{dataset.fingerprint[:6]}-{request.budget_s:g}s-seed{settings.train.seed}{costs}"
    model = "-".join(map(_slug, [settings.name, *recipe.overrides]))
    if len(model + training) > MAX_NAME:
        model = f"{model[: MAX_NAME - 9 - len(training)]}-{sha256_json(model)[:8]}"
    name = model + training
    overrides = (*recipe.overrides, *request.overrides)
    run_dir, results = (request.out / name).absolute(), request.results.absolute()
    return TableJob(
        name, recipe.preset, overrides, dataset.uri, run_dir, results, request.budget_s, request.episodes, cost
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)
