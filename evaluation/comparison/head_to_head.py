"""Two models judged on the same episodes of one data set: what a promotion is decided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metagmvae.evaluation.comparison.promotion_rule import FEWEST_EPISODES
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks
from metagmvae.evaluation.fewshot.paired import PairedDifference, paired_difference
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.package import LoadedModel

CHOSEN_BY_TEST = (
    "this chooses models by test classes: what they score on them later is no result any more; use --split validation"
)


@dataclass(frozen=True)
class EvalPlan:
    """The episodes that are run: of which data, which tasks, and how."""

    dataset: Dataset
    split: str
    tasks: tuple[dict[str, Any], ...]
    """way, shot, query, episodes and seed of each; the first is the one that matters."""
    mode: str = "transductive"
    other_data: bool = False
    """Models that were trained on other data are judged too."""
    progress: ProgressBar = no_progress


@dataclass(frozen=True)
class HeadToHead:
    """Accuracies of both by task, and the differences; no champion, no differences."""

    challenger: list[EpisodeResults]
    champion: list[EpisodeResults]
    differences: list[PairedDifference]
    warnings: list[str]
    """What a reader of the result should know."""


def open_plan(uri: str, split: str, tasks: Sequence[dict[str, Any]], **how: Any) -> EvalPlan:
    """A course that is sure to be there: the data set, its split, and enough classes and images for every task.

    Raises:
        DataError: one of these is missing, or there are too few episodes for an interval.
    """
    dataset = Dataset.open(uri)
    dataset.split(split)
    labels = dataset.labels(split)
    for task in tasks:
        EpisodeSampler(labels, **{key: task[key] for key in ("way", "shot", "query", "seed")})
        if task["episodes"] < FEWEST_EPISODES:
            raise DataError(f"--episodes {task['episodes']}: an interval needs {FEWEST_EPISODES} episodes at least")
    return EvalPlan(dataset, split, tuple(tasks), **how)


def evaluate_head_to_head(
    course: EvalPlan, challenger: tuple[str, LoadedModel], champion: tuple[str, LoadedModel] | None
) -> HeadToHead:
    """Judge both, each with its name for errors and warnings.

    An encoder alone is judged by the nearest class mean, as in its validation.

    Raises:
        DataError: a model was trained on other data, fits not to the images, or the two are of different kinds.
    """
    entrants = [challenger, *([champion] if champion else [])]
    warnings = [CHOSEN_BY_TEST] if course.split == "test" else []
    for name, loaded in entrants:
        warnings += check_training_data(course, name, loaded)
    if len({isinstance(loaded.model, MetaGMVAE) for _, loaded in entrants}) == 2:
        raise DataError(f"{challenger[0]} and {entrants[-1][0]}: one is an encoder alone, the other a whole model")
    results = [_evaluate(course, name, loaded) for name, loaded in entrants]
    if champion is None:
        return HeadToHead(results[0], [], [], warnings)
    differences = [paired_difference(one, other) for one, other in zip(*results, strict=True)]
    return HeadToHead(results[0], results[1], differences, warnings)


def check_training_data(course: EvalPlan, name: str, loaded: LoadedModel) -> list[str]:
    """Whether a model was trained on the data that it is to be judged on, and not on the very classes; warnings.

    Raises:
        DataError: it was trained on other data, and `other_data` is not set.
    """
    warnings = []
    if loaded.settings.data.train_split == course.split:
        warnings.append(f"{name} was trained on the split {course.split!r} that it is judged on")
    trained_on, ours = str(loaded.info.get("data_fingerprint", "unknown")), course.dataset.fingerprint
    if trained_on != ours:
        what = f"{name} was trained on other data ({trained_on[:12]}…) than {course.dataset.uri} holds ({ours[:12]}…)"
        if not course.other_data:
            raise DataError(
                f"{what}, maybe on its {course.split} classes; name its own with --data, or say --other-data"
            )
        warnings.append(what)
    return warnings


def _evaluate(course: EvalPlan, name: str, loaded: LoadedModel) -> list[EpisodeResults]:
    if isinstance(loaded.model, MetaGMVAE):
        how: dict[str, Any] = {"mode": course.mode, "progress": course.progress}
        judged = evaluate_tasks(loaded, name, course.dataset, course.split, course.tasks, **how)
        return [result for result, _ in judged]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    h_nF = encode_split(loaded.model.to(device), course.dataset, course.split, device)
    centred, labels = h_nF - h_nF.mean(dim=0), course.dataset.labels(course.split)
    return [nearest_class_mean(centred, labels, **task) for task in course.tasks]
