"""Evaluates models on the same episodes for a comparison. Stored results for exactly these episodes are reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from metagmvae.evaluation.comparison.formatting import Task, task_name
from metagmvae.evaluation.comparison.result_files import read_recorded, same_model
from metagmvae.evaluation.comparison.rows import EvalProtocol, Row, RowKind, Score, compared_settings
from metagmvae.evaluation.comparison.validation_rows import ComparedItem, EvaluatedModel
from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model
from metagmvae.evaluation.encoders.named_encoder import is_encoder_name
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.infra.registry.resolve import resolve_model
from metagmvae.infra.runs.run_folder import RESULTS
from metagmvae.pipelines.records import ProgressBar
from metagmvae.pipelines.sampling.episodes import group_protocol
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.trainer.package import LoadedModel

OF_ENCODERS = (
    *(f"model.{key}" for key in ("encoder", "image_size", "normalise", "average", "channels", "rectified")),
    "pretrain.",
    "trained_on",
)
"""Beginnings of the settings that an encoder alone has; the others are of what is trained on it."""


@dataclass(frozen=True)
class EvalRequest:
    """The episodes on which all models are evaluated."""

    split: str
    tasks: tuple[Task, ...]
    query: int
    episodes: int
    seed: int
    mode: PredictionMode
    head: str | None = None
    """Of encoders alone, a key of `evaluation.encoders.heads.HEADS`; None: nearest class mean."""
    weights: Path | None = None
    """File of weights of the encoder by name, of which there is one then; None: published ones."""
    image_size: int | None = None
    """Side to which images are resized for encoders by name; None: their published input size."""
    mix_groups: bool = False
    """Draw episodes regardless of the groups of the dataset."""

    def protocol(self, dataset: Dataset) -> EvalProtocol:
        """Return the protocol of these episodes on a dataset."""
        groups = group_protocol(dataset.episode_labels(self.split), self.mix_groups)
        episodes = (self.query, self.episodes, self.seed)
        return EvalProtocol(self.mode, self.split, dataset.fingerprint, *episodes, groups=groups)


def evaluate_items(
    items: Sequence[ComparedItem], dataset: Dataset, request: EvalRequest, *, reuse: bool, progress: ProgressBar
) -> tuple[list[ComparedItem], list[EvaluatedModel]]:
    """Evaluate every model on every task of the request.

    Args:
        items: what is compared; items that are not models are returned unchanged.
        dataset: data of the episodes.
        request: tasks and protocol.
        reuse: use stored results. They hold the accuracy of each episode, but no probabilities for calibration.
        progress: opens a progress bar for each task.

    Returns:
        All items in their order, with the rows of this evaluation; and the models, each for the first task.

    Raises:
        DataError: a model or the data do not fit the request.
    """
    evaluated = {
        position: _evaluate(item, dataset, request, reuse, progress)
        for position, item in enumerate(items)
        if item.is_model
    }
    merged = [evaluated[position][0] if position in evaluated else item for position, item in enumerate(items)]
    return merged, [model for _, model in evaluated.values()]


def _evaluate(
    item: ComparedItem, dataset: Dataset, request: EvalRequest, reuse: bool, progress: ProgressBar
) -> tuple[ComparedItem, EvaluatedModel]:
    protocol = request.protocol(dataset)
    results: dict[Task, EpisodeResults] = {}
    named = is_encoder_name(item.ref)
    encoder: dict[str, Any] = (
        {"dataset": dataset, "weights": request.weights, "image_size": request.image_size} if named else {}
    )
    load = partial(resolve_model, item.ref, **encoder)
    shots = dict.fromkeys(shot for _, shot in request.tasks)
    models = dict.fromkeys(shots, load()) if named else {shot: load(shot=shot) for shot in shots}
    is_encoder = not isinstance(models[request.tasks[0][1]].model, MetaLearner)
    # A run may keep another checkpoint for each shot. Tasks of the same one are evaluated together, so that its images
    # are encoded once.
    groups: dict[str, list[Task]] = {}
    for task in request.tasks:
        stored = _stored(item.ref, models[task[1]], protocol, task) if reuse and not is_encoder else None
        if stored is not None:
            results[task] = stored
        else:
            groups.setdefault(str(sorted(models[task[1]].info.items())), []).append(task)
    for tasks in groups.values():
        common = {key: getattr(request, key) for key in ("query", "episodes", "seed", "mix_groups")}
        episodes = [{"way": way, "shot": shot, **common} for way, shot in tasks]
        for result in evaluate_model(
            models[tasks[0][1]],
            dataset,
            episodes,
            split=request.split,
            mode=request.mode,
            head=request.head if is_encoder else None,
            name=item.name,
            progress=progress,
        ):
            results[result.way, result.shot] = result
    first = models[request.tasks[0][1]]
    row = _row(item, first, protocol, {task: results[task] for task in request.tasks})
    if is_encoder:
        item = replace(item, name=row.name)
    return replace(item, rows=(row,)), EvaluatedModel(item.name, first, results)


def _row(item: ComparedItem, loaded: LoadedModel, protocol: EvalProtocol, results: dict[Task, EpisodeResults]) -> Row:
    kind: RowKind = "version" if item.ref.startswith("models:") else "run" if item.rows or item.lines else "model"
    name, first = item.name, next(iter(results.values()))
    if first.head:
        kind, name, protocol = "encoder", f"{item.name}, {first.head}", replace(protocol, mode=first.mode)
    scores = {task: Score(result.mean, result.ci95, result) for task, result in results.items()}
    info: dict[str, Any] = loaded.info
    settings = compared_settings(loaded.settings.model_dump(mode="json"), info.get("data_fingerprint"))
    if first.head:
        heads = {task: _head(result) for task, result in results.items()}
        settings = {key: value for key, value in settings.items() if key.startswith(OF_ENCODERS)}
        settings |= {f"{task_name(task)} {key}": value for task, head in heads.items() for key, value in head}
    return Row(name, kind, item.ref, protocol, scores, info.get("elapsed_s"), info.get("step"), settings)


def _head(result: EpisodeResults) -> list[tuple[str, Any]]:
    """Return the settings of the head of an encoder, as they were chosen on the validation classes."""
    return list(result.tuning.settings.items()) if result.tuning is not None else []


def _stored(ref: str, loaded: LoadedModel, protocol: EvalProtocol, task: Task) -> EpisodeResults | None:
    """Return the stored result of exactly these episodes and this model from the run folder, if there is one."""
    file = Path(ref) / RESULTS / f"{protocol.split}-{task[0]}way-{task[1]}shot-{protocol.mode}.json"
    if not file.with_suffix(".parquet").is_file() or not file.is_file():
        return None
    (recorded,) = read_recorded(file)
    same = recorded.result.protocol == protocol and same_model(recorded.result, loaded.settings, loaded.info)
    return recorded.by_episode if same else None
