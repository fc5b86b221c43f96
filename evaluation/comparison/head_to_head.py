"""Evaluates a challenger and a champion on the same episodes of one dataset, as the basis of a promotion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from metagmvae.evaluation.comparison.promotion_rule import MIN_EPISODES
from metagmvae.evaluation.encoders.evaluate_encoders import evaluate_model
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults
from metagmvae.evaluation.fewshot.evaluate_tasks import check_task
from metagmvae.evaluation.fewshot.paired import PairedDifference, paired_difference
from metagmvae.pipelines.records import DataError, ProgressBar, no_progress
from metagmvae.pipelines.sampling.episodes import left_out_line
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.meta_learner import MetaLearner, PredictionMode
from metagmvae.training.trainer.package import LoadedModel

SELECTED_ON_TEST = "selecting models on test classes biases their test accuracy; use --split validation"


@dataclass(frozen=True)
class EvalPlan:
    """Dataset, episodes and evaluation mode of a comparison."""

    dataset: Dataset
    split: str
    tasks: tuple[dict[str, Any], ...]
    """way, shot, query, episodes and seed of each task. The challenger must be better on the first one."""
    mode: PredictionMode = "transductive"
    head: str | None = None
    """Of encoders alone, a key of `evaluation.encoders.heads.HEADS`; None: nearest class mean."""
    other_data: bool = False
    """Accept models that were trained on another dataset, with a warning."""
    progress: ProgressBar = no_progress


@dataclass(frozen=True)
class HeadToHead:
    """Results of both models, one for each task. Without a champion, its results and the differences are empty."""

    challenger: list[EpisodeResults]
    champion: list[EpisodeResults]
    differences: list[PairedDifference]
    warnings: list[str]
    """Reasons to doubt the result, one line each."""


def open_plan(uri: str, split: str, tasks: Sequence[dict[str, Any]], **options: Any) -> EvalPlan:
    """Open the dataset and check that its split has enough classes and images for every task.

    Raises:
        DataError: the dataset or split does not exist, is too small, or a task has too few episodes for an interval.
    """
    dataset = Dataset.open(uri)
    dataset.split(split)
    labels = dataset.episode_labels(split)
    for task in tasks:
        check_task(labels, task)
        if task["episodes"] < MIN_EPISODES:
            raise DataError(f"--episodes {task['episodes']}: a confidence interval needs at least {MIN_EPISODES}")
    return EvalPlan(dataset, split, tuple(tasks), **options)


def evaluate_head_to_head(
    plan: EvalPlan, challenger: tuple[str, LoadedModel], champion: tuple[str, LoadedModel] | None
) -> HeadToHead:
    """Evaluate the challenger and, if there is one, the champion. The names are for errors and warnings.

    Encoders alone classify with the head of the plan, in its mode; differences may be between modes then.

    Raises:
        DataError: a model was trained on another dataset or does not fit the images, or neither is an encoder alone
            and a head is given.
    """
    models = [challenger, *([champion] if champion else [])]
    warnings = [SELECTED_ON_TEST] if plan.split == "test" else []
    for name, loaded in models:
        warnings += _check_training_data(plan, name, loaded)
    encoders = [name for name, loaded in models if not isinstance(loaded.model, MetaLearner)]
    if plan.head is not None and not encoders:
        raise DataError(f"--head {plan.head}: is for an encoder alone, and none of the models is one; omit it")
    results = [_evaluate(plan, name, loaded) for name, loaded in models]
    warnings += [left_out_line("evaluation", r.shot, r.query, r.left_out) for r in results[0] if r.left_out]
    if champion is None:
        return HeadToHead(results[0], [], [], warnings)
    ours, theirs = results[0][0].mode, results[1][0].mode
    if ours != theirs:
        warnings.append(f"{models[1][0]} is evaluated in {theirs} mode and {challenger[0]} in {ours} mode")
    pair = partial(paired_difference, any_mode=bool(encoders))
    differences = list(map(pair, results[0], results[1]))
    return HeadToHead(results[0], results[1], differences, warnings)


def _check_training_data(plan: EvalPlan, name: str, loaded: LoadedModel) -> list[str]:
    """Return a warning if the model was trained on the evaluated classes, and one if on another dataset."""
    warnings = []
    if loaded.settings.data.train_split == plan.split:
        warnings.append(f"{name} was trained on the split {plan.split!r} that it is evaluated on")
    trained_on, evaluated_on = str(loaded.info.get("data_fingerprint", "unknown")), plan.dataset.fingerprint
    if trained_on != evaluated_on:
        warning = (
            f"{name} was trained on another dataset ({trained_on[:12]}…) than {plan.dataset.uri} ({evaluated_on[:12]}…)"
        )
        if not plan.other_data:
            raise DataError(
                f"{warning} and may have seen its {plan.split} classes; "
                "give its own dataset with --data, or use --other-data"
            )
        warnings.append(warning)
    return warnings


def _evaluate(plan: EvalPlan, name: str, loaded: LoadedModel) -> list[EpisodeResults]:
    head = None if isinstance(loaded.model, MetaLearner) else plan.head
    return evaluate_model(
        loaded, plan.dataset, plan.tasks, split=plan.split, mode=plan.mode, head=head, name=name, progress=plan.progress
    )
