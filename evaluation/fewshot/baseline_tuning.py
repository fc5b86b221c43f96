"""Baselines whose settings are chosen on validation classes, as the settings of the models are.

Notation: n images, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor

from metagmvae.evaluation.fewshot.baselines import BASELINES, all_baselines
from metagmvae.evaluation.fewshot.evaluate_episodes import EpisodeResults, Tuning
from metagmvae.evaluation.fewshot.paired import paired_with_baselines
from metagmvae.pipelines.grouped_labels import EpisodeLabels
from metagmvae.pipelines.records import DataError, ProgressCallback
from metagmvae.pipelines.sampling.query_sets import QuerySampler

UNSCALED = "features unscaled"
UNSCALED_BASELINES = ("nearest class mean", "logistic regression")
"""Baselines that are also run on the raw features of the encoder if the model scales its features."""
TUNING_EPISODES = 300
"""Maximum number of validation episodes used to choose the settings."""
SEED_OFFSET = 1_000_000
"""Added to the seed of the evaluated episodes, so that an evaluation on validation classes has other episodes."""


@dataclass(frozen=True)
class SplitFeatures:
    """Features of one split."""

    split: str
    labels: EpisodeLabels
    """Class ids, (n,), and groups if the dataset has them."""
    by_kind: Mapping[str, Tensor]
    """`scaled`: as the model gets them; `unscaled`: raw features, only if the model scales them. (n, F) each."""


@dataclass(frozen=True)
class TunedBaseline:
    """One baseline on the features `kinds` it may choose from, with the candidates of its settings."""

    name: str
    evaluate: Callable[..., EpisodeResults]
    kinds: tuple[str, ...]
    grid: Mapping[str, Sequence[Any]]

    def candidates(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield kind of features and settings; the defaults first."""
        for kind, *values in product(self.kinds, *self.grid.values()):
            yield kind, dict(zip(self.grid, values, strict=True))

    def settings(self, kind: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings as they are recorded."""
        return {**chosen, **({"features": kind} if kind == "unscaled" or len(self.kinds) > 1 else {})}


def evaluate_baselines(
    evaluated: SplitFeatures,
    validation: SplitFeatures | None,
    task: Mapping[str, Any],
    on_progress: ProgressCallback | None = None,
) -> dict[str, EpisodeResults]:
    """Evaluate all baselines on the episodes of a task, with settings chosen on validation classes.

    A choice is the candidate of the highest mean accuracy over episodes of the same way, shot and query, with balanced
    queries, as for the settings of a model; ties go to the first candidate.

    Args:
        evaluated: features of the evaluated split.
        validation: features of the validation classes; None: the settings are the defaults.
        task: way, shot, query, episodes and seed, and `mix_groups` if wanted.
        on_progress: called with the number of finished evaluations and of all.

    Returns:
        The results by name; `tuning` of each holds its settings.

    Raises:
        DataError: the evaluated split has too few classes, or a class too few images, for the task.
    """
    runs = _runs(tuple(evaluated.by_kind))
    note = _cannot_tune(validation, _trial_task(task))
    total = sum(1 + (0 if note else len(list(run.candidates()))) for run in runs)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return {run.name: evaluate_tuned(run, evaluated, validation, task, advance) for run in runs}


def evaluate_tuned(
    run: TunedBaseline,
    evaluated: SplitFeatures,
    validation: SplitFeatures | None,
    task: Mapping[str, int],
    advance: Callable[[], None] = lambda: None,
) -> EpisodeResults:
    """Evaluate one baseline as `evaluate_baselines` does; `advance` is called after each evaluation."""
    kind, chosen, tuning = choose_settings(run, validation, task, advance)
    if validation is not None and validation.split == evaluated.split and tuning.trials:
        tuning = replace(tuning, note="chosen on the evaluated classes, on other episodes")
    result = run.evaluate(evaluated.by_kind[kind], evaluated.labels, **chosen, **task)
    advance()
    return replace(result, tuning=tuning)


def choose_settings(
    run: TunedBaseline,
    validation: SplitFeatures | None,
    task: Mapping[str, int],
    advance: Callable[[], None] = lambda: None,
) -> tuple[str, dict[str, Any], Tuning]:
    """Choose the settings of a baseline for a task by the rule of `evaluate_baselines`.

    Returns:
        The kind of features, the settings, and the record of the choice.
    """
    trial_task = _trial_task(task)
    note = _cannot_tune(validation, trial_task)
    if validation is None or note:
        kind, chosen = next(run.candidates())
        return kind, chosen, Tuning(run.settings(kind, chosen), note=note)
    protocol = {"split": validation.split, "episodes": trial_task["episodes"], "seed": trial_task["seed"]}
    trials = []
    for kind, settings in run.candidates():
        result = run.evaluate(validation.by_kind[kind], validation.labels, **settings, **trial_task)
        trials.append((result, kind, settings))
        advance()
    _, kind, settings = max(trials, key=lambda trial: trial[0].mean)  # the first of equal ones
    rows = tuple(
        {"settings": run.settings(kind, settings), "accuracy": result.mean, "ci95": result.ci95}
        for result, kind, settings in trials
    )
    return kind, settings, Tuning(run.settings(kind, settings), rows, protocol)


def _trial_task(task: Mapping[str, int]) -> dict[str, int]:
    """Return the task of the validation episodes: balanced queries, other episodes than the evaluated ones; and the
    same rule for groups."""
    trial = {key: value for key, value in task.items() if key not in ("unbalanced", "dirichlet")}
    return trial | {"episodes": min(TUNING_EPISODES, task["episodes"]), "seed": task["seed"] + SEED_OFFSET}


def _runs(kinds: tuple[str, ...]) -> list[TunedBaseline]:
    """List the baselines; some of them once more on unscaled features only."""
    runs = [TunedBaseline(name, baseline, kinds, baseline.grid) for name, baseline in all_baselines().items()]
    if "unscaled" in kinds:
        runs += [
            TunedBaseline(f"{name}, {UNSCALED}", BASELINES[name], ("unscaled",), BASELINES[name].grid)
            for name in UNSCALED_BASELINES
        ]
    return runs


def _cannot_tune(validation: SplitFeatures | None, task: Mapping[str, Any]) -> str:
    """Return why the settings must be the defaults; empty if the validation classes suffice for the task."""
    if validation is None:
        return "defaults: the dataset has no validation split"
    try:
        QuerySampler(validation.labels, **{key: value for key, value in task.items() if key != "episodes"}).batch(0, 1)
    except DataError as error:
        return f"defaults: the split {validation.split!r} is too small ({str(error).partition(';')[0]})"
    return ""


def baselines_summary(results: Sequence[EpisodeResults]) -> dict[str, Any]:
    """Return the baselines of some tasks as plain values; empty if none were evaluated.

    `baselines` holds one row per task and baseline with its settings, `paired` the model minus the baseline on the same
    episodes. Accuracies and differences are fractions in [0, 1].
    """
    rows = []
    for result in results:
        for name, baseline in result.baselines.items():
            rows.append({"baseline": name} | baseline.summary() | (baseline.tuning or Tuning({})).summary())
    paired = [row for result in results for row in paired_with_baselines(result)]
    return ({"baselines": rows} if rows else {}) | ({"paired": paired} if paired else {})


def baseline_trials(results: Sequence[EpisodeResults]) -> list[dict[str, Any]]:
    """Return all candidates that were tried for the settings of the baselines, one row per task and baseline."""
    return [
        {"baseline": name, "way": result.way, "shot": result.shot, "query": result.query}
        | dict(baseline.tuning.protocol)
        | {"trials": list(baseline.tuning.trials)}
        for result in results
        for name, baseline in result.baselines.items()
        if baseline.tuning is not None and baseline.tuning.trials
    ]
