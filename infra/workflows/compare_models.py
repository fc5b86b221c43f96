"""Models judged for a comparison, on the same episodes; what is stored of those very episodes is not judged again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metagmvae.evaluation.comparison.result_files import read_recorded, same_model
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, RowKind, Score
from metagmvae.evaluation.comparison.validation_rows import ComparedItem, compared_settings
from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs.run_folder import RESULTS

if TYPE_CHECKING:
    from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
    from metagmvae.evaluation.fewshot.predict import PredictionMode
    from metagmvae.pipelines.records import ProgressBar
    from metagmvae.pipelines.shards.dataset import Dataset
    from metagmvae.training.trainer.package import LoadedModel


@dataclass(frozen=True)
class EvalRequest:
    """What models are judged on."""

    split: str
    tasks: tuple[tuple[int, int], ...]
    """(way, shot)."""
    query: int
    episodes: int
    seed: int
    mode: PredictionMode

    def protocol(self, dataset: Dataset) -> EvalProtocol:
        return EvalProtocol(self.mode, self.split, dataset.fingerprint, self.query, self.episodes, self.seed)


@dataclass(frozen=True)
class EvaluatedItem:
    """A source with the row of its judgement in the place of its own, and the model for the first task."""

    source: ComparedItem
    loaded: LoadedModel
    results: dict[tuple[int, int], EpisodeResults]


def evaluate_item(
    source: ComparedItem, dataset: Dataset, request: EvalRequest, *, afresh: bool, progress: ProgressBar
) -> EvaluatedItem:
    """Judge one model on every task of the request.

    Args:
        source: a judgeable one.
        dataset: what it is judged on.
        request: tasks and protocol.
        afresh: judge again what is stored too: accuracies by episode are stored, probabilities are not.
        progress: opens a progress bar for each task.

    Raises:
        DataError: the model or the data do not fit the request.
    """
    protocol = request.protocol(dataset)
    results: dict[tuple[int, int], EpisodeResults] = {}
    models = {shot: resolve_model(source.ref, shot=shot) for shot in dict.fromkeys(shot for _, shot in request.tasks)}
    for task in request.tasks:
        stored = None if afresh else _stored(source.ref, models[task[1]], protocol, task)
        if stored is not None:
            results[task] = stored
    # A run may keep a model for each shot; where it is the same one, its images are encoded once for all tasks.
    states: dict[str, list[tuple[int, int]]] = {}
    for task in request.tasks:
        if task not in results:
            states.setdefault(str(sorted(models[task[1]].info.items())), []).append(task)
    for tasks in states.values():
        same = {"query": request.query, "episodes": request.episodes, "seed": request.seed}
        wanted = [{"way": way, "shot": shot, **same} for way, shot in tasks]
        loaded = models[tasks[0][1]]
        for result in evaluate_tasks(
            loaded, dataset, wanted, split=request.split, mode=request.mode, name=source.name, progress=progress
        ):
            results[result.way, result.shot] = result
    first = models[request.tasks[0][1]]
    row = _row(source, first, protocol, {task: results[task] for task in request.tasks})
    return EvaluatedItem(replace(source, rows=(row,)), first, results)


def _row(
    source: ComparedItem, loaded: LoadedModel, protocol: EvalProtocol, results: dict[tuple[int, int], EpisodeResults]
) -> Row:
    kind: RowKind = "version" if source.ref.startswith("models:") else "run" if source.rows or source.lines else "model"
    scores = {task: Score(result.mean, result.ci95, result) for task, result in results.items()}
    info: dict[str, Any] = loaded.info
    compared = compared_settings(loaded.settings, info.get("data_fingerprint"))
    return Row(source.name, kind, source.ref, protocol, scores, info.get("elapsed_s"), info.get("step"), compared)


def _stored(ref: str, loaded: LoadedModel, protocol: EvalProtocol, task: tuple[int, int]) -> EpisodeResults | None:
    """Accuracies of these very episodes by this very model, from the run folder."""
    file = Path(ref) / RESULTS / f"{protocol.split}-{task[0]}way-{task[1]}shot-{protocol.mode}.json"
    if not file.with_suffix(".parquet").is_file() or not file.is_file():
        return None
    (found,) = read_recorded(file)
    same = found.recorded.protocol == protocol and same_model(found.recorded, loaded.settings, loaded.info)
    return found.each if same else None


def evaluate_all(
    sources: Sequence[ComparedItem], dataset: Dataset, request: EvalRequest, *, afresh: bool, progress: ProgressBar
) -> tuple[list[ComparedItem], list[EvaluatedItem]]:
    """Judge every model among the sources; the others stay as they are, in their places."""
    answer, judged = [], []
    for source in sources:
        if source.judgeable:
            judged.append(evaluate_item(source, dataset, request, afresh=afresh, progress=progress))
            answer.append(judged[-1].source)
        else:
            answer.append(source)
    return answer, judged
