"""Result files read back: what `metagmvae evaluate --record` and `--results` wrote, as rows of a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metagmvae.configs.load import fingerprint
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, RowKind, Score, decisive_settings
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.pipelines.files import read_json
from metagmvae.pipelines.records import DataError

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class RecordedResult(BaseModel):
    """One task of a result file; what else stands there is not for comparisons."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    accuracy: Fraction
    ci95: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    way: Count
    shot: Count
    query: Count
    episodes: Count
    seed: int
    mode: Literal["transductive", "inductive"]
    split: str
    data_fingerprint: str
    settings: dict[str, Any] = {}
    settings_fingerprint: str = ""
    trained: dict[str, Any] = {}
    environment: dict[str, Any] = {}

    @property
    def when(self) -> str:
        """When it was judged; texts that sort by time."""
        return str(self.environment.get("time", ""))

    @property
    def state(self) -> str:
        """Equal for results of one state of one run, which may keep another best model for each shot."""
        trained = self.trained
        if "selected_by" in trained:
            trained = {k: v for k, v in trained.items() if k not in ("step", "selected_by", "validation_accuracy")}
        return f"{self.settings_fingerprint} {sorted(trained.items())}"

    @property
    def protocol(self) -> EvalProtocol:
        return EvalProtocol(self.mode, self.split, self.data_fingerprint, self.query, self.episodes, self.seed)

    def compared_settings(self) -> dict[str, Any]:
        """Settings that decide how good the model is, and the data that it was trained on."""
        trained_on = self.trained.get("data_fingerprint")
        return decisive_settings(self.settings) | ({"trained_on": trained_on} if trained_on else {})


@dataclass(frozen=True)
class FoundResults:
    """A recorded task, and its accuracies by episode where a Parquet file beside it has them."""

    recorded: RecordedResult
    each: EpisodeResults | None


def read_recorded(path: Path) -> list[FoundResults]:
    """The tasks of a result file; accuracies by episode from the Parquet file of the same name, if there is one.

    Raises:
        DataError: it is not a result of `metagmvae evaluate`; the Parquet file is damaged, or of other episodes.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a result of `metagmvae evaluate --record`")
    rows = content["rows"] if isinstance(content.get("rows"), list) else [{}]
    try:
        tasks = [RecordedResult.model_validate(content | dict(row)) for row in rows]
    except (ValidationError, TypeError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise DataError(f"{path}: not a result of `metagmvae evaluate --record` ({reason})") from error
    episodes = path.with_suffix(".parquet")
    if len(tasks) > 1 or not episodes.is_file():
        return [FoundResults(task, None) for task in tasks]
    return [FoundResults(tasks[0], read_episodes(episodes, tasks[0]))]


def read_episodes(path: Path, recorded: RecordedResult) -> EpisodeResults:
    """Accuracies by episode that `EpisodeResults.write_parquet` wrote for a recorded task.

    Raises:
        DataError: it is damaged, or its episodes are not those of the task.
    """
    try:
        table = pq.read_table(path, columns=["episode", "accuracy", "way", "shot", "query", "seed", "mode"])
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not the accuracies of episodes ({str(error).splitlines()[0]})") from error
    accuracies = columns["accuracy"].astype(np.float64)
    same = len(accuracies) == recorded.episodes and all(
        (columns[name] == getattr(recorded, name)).all() for name in ("way", "shot", "query", "seed", "mode")
    )
    numbered = np.array_equal(columns["episode"], np.arange(len(accuracies)))
    if not (same and numbered and abs(accuracies.mean() - recorded.accuracy) < 1e-9):
        raise DataError(
            f"{path}: holds other episodes than {path.with_suffix('.json')} tells of; judge the model again"
        )
    way, shot, query, seed = recorded.way, recorded.shot, recorded.query, recorded.seed
    return EpisodeResults(way, shot, query, seed, recorded.mode, accuracies, 0.0)


def rows_of(name: str, kind: RowKind, source: str, found: Iterable[FoundResults]) -> list[Row]:
    """Rows of one model: tasks of equal protocol and of the same state of the model stand in one row.

    Raises:
        DataError: a task was found twice with different results.
    """
    groups: dict[tuple[EvalProtocol, str], list[FoundResults]] = {}
    for one in found:
        groups.setdefault((one.recorded.protocol, one.recorded.state), []).append(one)
    return [_row(name, kind, source, protocol, some) for (protocol, _), some in groups.items()]


def _row(name: str, kind: RowKind, source: str, protocol: EvalProtocol, found: Sequence[FoundResults]) -> Row:
    scores: dict[tuple[int, int], Score] = {}
    for one in found:
        task = (one.recorded.way, one.recorded.shot)
        score = Score(one.recorded.accuracy, one.recorded.ci95, one.each)
        if task in scores and scores[task].accuracy != score.accuracy:
            raise DataError(f"{name}: two results of {task[0]}-way {task[1]}-shot, {source}; name one of them")
        scores[task] = score
    first = found[0].recorded
    steps = max((one.recorded.trained["step"] for one in found if "step" in one.recorded.trained), default=None)
    return Row(name, kind, source, protocol, scores, first.trained.get("elapsed_s"), steps, first.compared_settings())


def recorded_name(path: Path) -> str:
    """`NAME` of `NAME-5way-1shot.json`; the whole stem of any other file."""
    return re.sub(r"-\d+way-\d+shot$", "", path.stem)


def same_model(recorded: RecordedResult, settings: Settings, info: Mapping[str, Any]) -> bool:
    """Whether a result is of this very state of a model: the same settings, trained as far."""
    return recorded.settings_fingerprint == fingerprint(settings) and recorded.trained == dict(info)
