"""The arguments of `metagmvae table --run`, checked, and its datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metagmvae.configs.load import SettingsError
from metagmvae.evaluation.comparison.result_files import RecordedDataset
from metagmvae.evaluation.fewshot.evaluate_tasks import MAX_EPISODES
from metagmvae.evaluation.paper_tables.match_results import FREE_SETTINGS
from metagmvae.evaluation.paper_tables.table_structure import TableName, TablePart
from metagmvae.evaluation.provenance import dataset_origin
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset

ALLOWED = ("run.", "tracking.", *FREE_SETTINGS)
"""Settings that `--set` may change: with others the model would not be that of the row."""
SET_HERE = ("run.out", "pretrain.steps", "train.steps", "train.checkpoint_every")
"""Settings that follow from the budget and the row."""


@dataclass(frozen=True)
class TableRequest:
    """The arguments of `metagmvae table NAME --run`."""

    name: TableName
    data: tuple[str, ...]
    results: Path
    out: Path
    """Folder of the run folders."""
    budget_s: float
    """Seconds of training steps of each training."""
    episodes: int
    """Most episodes of each evaluation."""
    overrides: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    """Each row is trained with each of these seeds; empty: with that of its preset or of `overrides`."""
    workers: int = 0
    """Ray tasks at the same time; 0: one training after another in this process."""


@dataclass(frozen=True)
class GivenData:
    """A dataset of `--data`, and the images that it was made from."""

    dataset: Dataset
    images: RecordedDataset


def check_request(request: TableRequest) -> None:
    """Check that `--set` changes nothing that decides which model is trained, and the numbers.

    Raises:
        SettingsError: naming the first setting that does.
        DataError: a number is out of range.
    """
    if request.workers < 0:
        raise DataError(f"--workers is {request.workers}; give 0 or more")
    if wrong := [seed for seed in request.seeds if seed < 0 or request.seeds.count(seed) > 1]:
        raise DataError(f"--seeds {wrong[0]}: give different numbers of 0 or more")
    if not 1 <= request.episodes <= MAX_EPISODES:
        raise DataError(f"--episodes is {request.episodes}; give a number from 1 to {MAX_EPISODES:,}")
    for override in request.overrides:
        key = override.partition("=")[0].strip()
        if key == "run.engine" and request.workers:
            raise SettingsError(
                f"--set {override}: with --workers each training is a Ray task already; omit one of them"
            )
        if key == "train.seed" and request.seeds:
            raise SettingsError(f"--set {override}: --seeds gives the seeds already; omit one of them")
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
            named = " and ".join(sorted(known))
            raise DataError(f"--data {uri}: is of {images.name or 'unknown images'}, the table of {named}")
        if any((g.images.name, g.dataset.kind) == (images.name, dataset.kind) for g in given):
            raise DataError(f"--data {uri}: is the second dataset of {dataset.kind} of {images.name}; give one of them")
        given.append(GivenData(dataset, images))
    return given
