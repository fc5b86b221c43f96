"""Reads the result files of `metagmvae evaluate` (`--record`, `--results`) as rows of a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from metagmvae.configs.load import fingerprint
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.formatting import Task
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, RowKind, Score, compared_settings
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.provenance import known_dataset
from metagmvae.pipelines.files import check_document, read_json
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import GroupProtocol

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
NOT_A_RESULT = "so it is not a result of `metagmvae evaluate --record`"
HalfWidth = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Gain = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
"""A difference of accuracies."""
Budget = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Seconds."""
EvalMode = Literal["transductive", "inductive"]


class RecordedDifference(BaseModel, frozen=True):
    """Accuracy of a model minus that of a baseline on the same episodes of one task."""

    baseline: str
    baseline_mode: EvalMode
    way: Count
    shot: Count
    difference: Gain
    ci95: HalfWidth


class RecordedAccuracy(BaseModel):
    """Accuracy of a model or a baseline on the episodes of one task."""

    model_config = ConfigDict(frozen=True)

    accuracy: Fraction
    ci95: HalfWidth | None
    """None: a single episode."""
    way: Count
    shot: Count
    query: Count
    episodes: Count
    seed: int
    mode: EvalMode
    unbalanced: bool = False
    dirichlet: float | None = None
    groups: GroupProtocol | None = None
    ece: Fraction | None = None
    """Expected calibration error; None: not recorded, or no probabilities."""
    ece_uncalibrated: Fraction | None = None
    """The same of the model's own probabilities."""
    temperature: float = 1.0
    uniform: Fraction = 0.0
    """Of the calibration, with the temperature; 0 in files of older versions."""


class RecordedBaseline(RecordedAccuracy):
    """A row of `baselines` in a result file."""

    baseline: str
    settings: dict[str, Any] = {}
    validation_accuracy: Fraction | None = None
    """Of the chosen settings on validation classes; None: nothing was chosen, the settings are the defaults."""


class RecordedDataset(BaseModel, frozen=True):
    """Name and options of the dataset of images behind a result; empty in older files."""

    name: str = ""
    options: dict[str, Any] = {}


class RecordedResult(RecordedAccuracy):
    """The fields of a result file that tables and comparisons use."""

    split: str
    dataset: RecordedDataset = RecordedDataset()
    source_fingerprint: str = ""
    baselines: list[RecordedBaseline] = []
    paired: list[RecordedDifference] = []
    data_fingerprint: str
    settings: dict[str, Any] = {}
    settings_fingerprint: str = ""
    trained: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    """How the encoder was trained; empty in older files."""
    budget_s: Budget | None = None
    """Seconds that the training was planned for (`metagmvae table --run`); None: not planned."""
    most_episodes: Count | None = None
    """Episodes that were asked for (`metagmvae table --run`); fewer are evaluated where the budget allows no more."""
    environment: dict[str, Any] = {}

    @property
    def images(self) -> RecordedDataset:
        """The dataset of images; for older files by the fingerprints of `KNOWN_DATASETS`, else without a name."""
        if self.dataset.name:
            return self.dataset
        return RecordedDataset.model_validate(known_dataset(self.data_fingerprint, self.source_fingerprint))

    @property
    def when(self) -> str:
        """Time of the evaluation in ISO format, or empty."""
        return str(self.environment.get("time", ""))

    @property
    def state(self) -> str:
        """Equal for results of the same training state. A run may keep another best checkpoint for each shot."""
        trained = self.trained
        if "selected_by" in trained:
            trained = {k: v for k, v in trained.items() if k not in ("step", "selected_by", "validation_accuracy")}
        return f"{self.settings_fingerprint} {sorted(trained.items())}"

    @property
    def protocol(self) -> EvalProtocol:
        """How and on which data the task was evaluated."""
        episodes = (self.query, self.episodes, self.seed, self.unbalanced, self.dirichlet, self.groups)
        return EvalProtocol(self.mode, self.split, self.data_fingerprint, *episodes)

    def compared_settings(self) -> dict[str, Any]:
        """Return the settings that affect accuracy, with the fingerprint of the training data."""
        return compared_settings(self.settings, self.trained.get("data_fingerprint"))


class _RecordedRows(BaseModel):
    """The tasks of a result file: `rows` for several (`--ways`), else the file itself."""

    rows: Annotated[list[dict[str, Any]], Field(min_length=1)] = [{}]


@dataclass(frozen=True)
class RecordedTask:
    """A recorded result, with the accuracy of each episode if a Parquet file of the same name holds them."""

    result: RecordedResult
    by_episode: EpisodeResults | None


def check_results_folder(results: Path) -> None:
    """Refuse a folder of result files that does not exist.

    Raises:
        DataError: it does not exist.
    """
    if not results.is_dir():
        raise DataError(f"--results {results}: no such folder; give the folder of the files of evaluate --record")


def read_recorded(path: Path) -> list[RecordedTask]:
    """Read the tasks of a result file, and the accuracy of each episode from the Parquet file of the same name.

    Raises:
        DataError: not a result of `metagmvae evaluate`, or the Parquet file is damaged or of other episodes.
    """
    tasks = read_results(path)
    episodes = path.with_suffix(".parquet")
    if len(tasks) > 1 or not episodes.is_file():
        return [RecordedTask(task, None) for task in tasks]
    return [RecordedTask(tasks[0], _read_episodes(episodes, tasks[0]))]


def read_results(path: Path) -> list[RecordedResult]:
    """Read the tasks of a result file; each has its own baselines and differences.

    Raises:
        DataError: not a result of `metagmvae evaluate`.
    """
    content = read_json(path)
    rows = check_document(_RecordedRows, content, path, NOT_A_RESULT).rows
    tasks = [check_document(RecordedResult, content | row, path, NOT_A_RESULT) for row in rows]
    return [
        task.model_copy(
            update={
                key: [row for row in getattr(task, key) if (row.way, row.shot) == (task.way, task.shot)]
                for key in ("baselines", "paired")
            }
        )
        for task in tasks
    ]


def _read_episodes(path: Path, recorded: RecordedResult) -> EpisodeResults:
    """Read the file that `EpisodeResults.write_parquet` wrote, and check that it belongs to the recorded result."""
    try:
        table = pq.read_table(path, columns=["episode", "accuracy", "way", "shot", "query", "seed", "mode"])
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a file of episode accuracies ({str(error).splitlines()[0]})") from error
    accuracies = columns["accuracy"].astype(np.float64)
    same = len(accuracies) == recorded.episodes and all(
        (columns[name] == getattr(recorded, name)).all() for name in ("way", "shot", "query", "seed", "mode")
    )
    numbered = np.array_equal(columns["episode"], np.arange(len(accuracies)))
    if not (same and numbered and abs(accuracies.mean() - recorded.accuracy) < 1e-9):
        raise DataError(f"{path}: its episodes are not those of {path.with_suffix('.json')}; evaluate the model again")
    way, shot, query, seed = recorded.way, recorded.shot, recorded.query, recorded.seed
    return EpisodeResults(way, shot, query, seed, recorded.mode, accuracies, 0.0, groups=recorded.groups)


def rows_of(name: str, kind: RowKind, source: str, tasks: Iterable[RecordedTask]) -> list[Row]:
    """Make the rows of one model: one row for each protocol and training state.

    Raises:
        DataError: a task has two different results.
    """
    groups: dict[tuple[EvalProtocol, str], list[RecordedTask]] = {}
    for task in tasks:
        groups.setdefault((task.result.protocol, task.result.state), []).append(task)
    return [_row(name, kind, source, protocol, group) for (protocol, _), group in groups.items()]


def _row(name: str, kind: RowKind, source: str, protocol: EvalProtocol, tasks: Sequence[RecordedTask]) -> Row:
    scores: dict[Task, Score] = {}
    for recorded in tasks:
        result = recorded.result
        task = (result.way, result.shot)
        if task in scores and scores[task].accuracy != result.accuracy:
            raise DataError(f"{name}: {source} holds two results of {task[0]}-way {task[1]}-shot; give one of them")
        scores[task] = Score(result.accuracy, result.ci95, recorded.by_episode)
    first = tasks[0].result
    steps = max((task.result.trained["step"] for task in tasks if "step" in task.result.trained), default=None)
    return Row(name, kind, source, protocol, scores, first.trained.get("elapsed_s"), steps, first.compared_settings())


def recorded_name(path: Path) -> str:
    """Return `NAME` of `NAME-5way-1shot.json`, and the stem of any other file."""
    return re.sub(r"-\d+way-\d+shot$", "", path.stem)


def same_model(recorded: RecordedResult, settings: Settings, info: Mapping[str, Any]) -> bool:
    """Return whether a result is of exactly this model: the same settings and the same training state."""
    return recorded.settings_fingerprint == fingerprint(settings) and recorded.trained == dict(info)
