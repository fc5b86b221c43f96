"""What `metagmvae table --run` has to do: the trainings and evaluations whose results are missing, cheapest first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metagmvae.configs.load import SettingsError, load_settings, presets
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.result_files import EvalMode, RecordedDataset
from metagmvae.evaluation.fewshot.evaluate_tasks import MAX_EPISODES
from metagmvae.evaluation.paper_tables.match_results import (
    FREE_SETTINGS,
    ResultFolder,
    compared_settings,
    results_of,
)
from metagmvae.evaluation.paper_tables.table_rows import Column, Recipe, TablePart, TableRow
from metagmvae.evaluation.provenance import dataset_origin
from metagmvae.pipelines.files import sha256_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.methods_by_name import find_method

ALLOWED = ("run.", "tracking.", *FREE_SETTINGS)
"""Settings that `--set` may change: with others the model would not be that of the row."""
SET_HERE = ("run.out", "pretrain.steps", "train.steps", "train.checkpoint_every")
"""Settings that follow from the budget and the row."""


@dataclass(frozen=True)
class TableRequest:
    """The arguments of `metagmvae table NUMBER --run`."""

    number: int
    data: tuple[str, ...]
    results: Path
    out: Path
    """Folder of the run folders."""
    budget_s: float
    """Seconds of training steps of each training."""
    episodes: int
    """Most episodes of each evaluation."""
    overrides: tuple[str, ...]
    workers: int = 0
    """Ray tasks at the same time; 0: one training after another in this process."""


@dataclass(frozen=True)
class GivenData:
    """A dataset of `--data`, and the images that it was made from."""

    dataset: Dataset
    images: RecordedDataset


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
    rows: tuple[str, ...]
    """Names of the systems that need it."""
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class JobList:
    """The jobs, and what cannot be run."""

    jobs: tuple[TableJob, ...]
    left_out: tuple[dict[str, str], ...]
    """Rows whose dataset was not given."""
    failed: tuple[dict[str, str], ...]
    """Rows whose settings cannot be used."""
    done: int
    """Cells that have a result."""


def check_request(request: TableRequest) -> None:
    """Check that `--set` changes nothing that decides which model is trained, and the numbers.

    Raises:
        SettingsError: naming the first setting that does.
        DataError: a number is out of range.
    """
    if request.workers < 0:
        raise DataError(f"--workers is {request.workers}; give 0 or more")
    if not 1 <= request.episodes <= MAX_EPISODES:
        raise DataError(f"--episodes is {request.episodes}; give a number from 1 to {MAX_EPISODES:,}")
    for override in request.overrides:
        key = override.partition("=")[0].strip()
        if key == "run.engine" and request.workers:
            raise SettingsError(
                f"--set {override}: with --workers each training is a Ray task already; omit one of them"
            )
        if key in SET_HERE:
            raise SettingsError(f"--set {override}: {key} follows from --budget, --out and the row; leave it out")
        if not key.startswith(ALLOWED):
            allowed = "run.…, tracking.…, train.seed and settings of its speed"
            raise SettingsError(f"--set {override}: would change the model of the rows; only {allowed} can be set")


def open_data(uris: Sequence[str], parts: Sequence[TablePart]) -> list[GivenData]:
    """Open the datasets.

    Raises:
        DataError: one cannot be opened, no column of the table is of it, or two are of the same kind and name.
    """
    known = {column.dataset for part in parts for column in part.columns}
    given: list[GivenData] = []
    for uri in uris:
        dataset = Dataset.open(uri)
        images = RecordedDataset.model_validate(dataset_origin(dataset.manifest, dataset.fingerprint))
        if images.name not in known:
            raise DataError(f"--data {uri}: is of {images.name or 'unknown images'}, the table of {_and(known)}")
        if any((g.images.name, g.dataset.kind) == (images.name, dataset.kind) for g in given):
            raise DataError(f"--data {uri}: is the second dataset of {dataset.kind} of {images.name}; give one of them")
        given.append(GivenData(dataset, images))
    return given


def plan_jobs(
    parts: Sequence[TablePart], folder: ResultFolder, given: Sequence[GivenData], request: TableRequest
) -> JobList:
    """Collect what has no result with this budget, seed and data; trainings that several rows share appear once."""
    jobs: dict[str, TableJob] = {}
    left_out: dict[tuple[str, str], dict[str, str]] = {}
    failed: dict[tuple[str, str], dict[str, str]] = {}
    done = 0
    for row, column, recipe in _cells(parts):
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
        if _has_result(folder, recipe, column, row.mode, data, request, settings.train.seed):
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


def _cells(parts: Sequence[TablePart]) -> Iterator[tuple[TableRow, Column, Recipe]]:
    for part in parts:
        for row in part.rows:
            yield from ((row, column, recipe) for column, recipe in row.recipes.items())


def _data_kind(settings: Settings) -> str:
    """Whether the training reads images, or features because its encoder must have been trained before."""
    needs_encoder = find_method(settings.method.name).needs_encoder(settings)
    return "features" if needs_encoder and not settings.pretrain.steps else "images"


def _cost(settings: Settings) -> int:
    meta = settings.train.steps * find_method(settings.method.name).images_per_step(settings)
    return settings.pretrain.steps * settings.pretrain.batch + meta


def _has_result(
    folder: ResultFolder,
    recipe: Recipe,
    column: Column,
    mode: EvalMode,
    data: GivenData,
    request: TableRequest,
    seed: int,
) -> bool:
    found = results_of(folder, recipe, column, mode, [data.images], request.budget_s)
    return any(
        item.result.data_fingerprint == data.dataset.fingerprint
        and item.result.settings["train"].get("seed") == seed
        and (item.result.most_episodes or item.result.episodes) >= request.episodes
        for item, _ in found
    )


def _training_key(settings: Settings, data_fingerprint: str) -> str:
    """Equal for rows that are evaluations of the same training."""
    flat = compared_settings(json.loads(settings.model_dump_json()))
    trained = {key: value for key, value in flat.items() if not key.startswith("adapt.")}
    return sha256_json([trained, settings.pretrain.steps, settings.train.steps, settings.train.seed, data_fingerprint])


def _new_job(recipe: Recipe, settings: Settings, dataset: Dataset, cost: int, request: TableRequest) -> TableJob:
    name = "-".join(map(_slug, [settings.name, *recipe.overrides]))
    name += f"-{dataset.fingerprint[:6]}-{request.budget_s:g}s-seed{settings.train.seed}"
    return TableJob(
        name,
        recipe.preset,
        (*recipe.overrides, *request.overrides),
        dataset.uri,
        (request.out / name).absolute(),
        request.results.absolute(),
        request.budget_s,
        request.episodes,
        cost,
        (),
        (),
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def _and(names: set[str]) -> str:
    return " and ".join(sorted(names))
