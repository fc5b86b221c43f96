"""Our result of a cell: its trainings, their mean, and the paired difference to the base row of the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from metagmvae.evaluation.comparison.pairwise import compare_with_first
from metagmvae.evaluation.comparison.result_files import (
    Count,
    Fraction,
    Gain,
    HalfWidth,
    RecordedAccuracy,
    read_recorded,
    rows_of,
)
from metagmvae.evaluation.comparison.results_table import OMNIGLOT_SPLITS
from metagmvae.evaluation.comparison.rows import Row, add_training_means
from metagmvae.evaluation.paper_tables.match_results import FoundResult

Found = tuple[FoundResult, RecordedAccuracy]
"""A result, and the accuracy of it that counts: that of the model or of a baseline on it."""


class DocumentModel(BaseModel):
    """A part of the JSON document."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OurResult(DocumentModel):
    """Our accuracy of a cell: of one training, or the mean over trainings with different seeds."""

    accuracy: Fraction
    spread: HalfWidth | None
    """Half width of the 95% interval over episodes; of several trainings their standard deviation."""
    trainings: Count
    mode: str
    split: str
    query: Count
    episodes: Count
    """The fewest of a training."""
    data_split: str
    """Split of Omniglot's classes; empty for other datasets."""
    chosen_by_validation: bool
    """Whether the checkpoint was chosen with labelled validation classes."""
    pretrain_steps: int
    """Steps of the training of the encoder, in the same run or before, mean over trainings; 0: none."""
    steps: int
    """Steps of meta-training, mean over trainings."""
    seconds: float | None
    """Of the training, mean over trainings; None: not recorded."""
    budget_s: float | None
    hardware: str
    costs: dict[str, Any]
    """Values of `COST_SETTINGS` that the method uses."""
    files: list[str]


class Difference(DocumentModel):
    """Our accuracy minus that of the base row on the same episodes, trainings of equal seeds paired."""

    difference: Gain
    ci95: HalfWidth
    """Half width of its 95% interval: over episodes for one training, over trainings (Student's t) for several."""
    trainings: Count
    episodes: Count


def chosen_trainings(found: Sequence[Found]) -> list[Found]:
    """Take the longest training, of equally long ones that with the most episodes, the most seeds, and the latest.

    All its seeds on the same images are taken. Trainings for the same budget on the same hardware are equally long,
    whatever the steps that it allowed.
    """

    def kind(item: Found) -> tuple[object, ...]:
        result = item[0].result
        planned = (result.budget_s, result.most_episodes, _hardware(result.environment))
        length = (*item[0].steps, item[1].episodes) if result.budget_s is None else planned
        return length, item[0].costs, result.images

    groups: list[list[Found]] = []
    for item in sorted(found, key=lambda item: item[0].result.when):
        group = next((group for group in groups if kind(group[0]) == kind(item)), None)
        groups.append([item]) if group is None else group.append(item)

    def rank(group: list[Found]) -> tuple[object, ...]:
        longest = max((*item[0].steps, item[1].episodes) for item in group)
        return *longest, len({item[0].seed for item in group}), group[-1][0].result.when

    return list({item[0].seed: item for item in max(groups, key=rank)}.values())


def our_result(trainings: Sequence[Found]) -> OurResult:
    """Return the mean over trainings, as `chosen_trainings` returns them."""
    rows = [row for _, row in trainings]
    results = [item.result for item, _ in trainings]
    pretrain_steps, steps = zip(*(item.steps for item, _ in trainings), strict=True)
    seconds = [result.trained["elapsed_s"] for result in results if "elapsed_s" in result.trained]
    accuracies = [row.accuracy for row in rows]
    split = str(results[0].images.options.get("split", ""))
    return OurResult(
        accuracy=statistics.fmean(accuracies),
        spread=rows[0].ci95 if len(rows) == 1 else statistics.stdev(accuracies),
        trainings=len(rows),
        mode=rows[0].mode,
        split=results[0].split,
        query=rows[0].query,
        episodes=min(row.episodes for row in rows),
        data_split=OMNIGLOT_SPLITS.get(split, split),
        chosen_by_validation=any(result.trained.get("selected_by") for result in results),
        pretrain_steps=round(statistics.fmean(pretrain_steps)),
        steps=round(statistics.fmean(steps)),
        seconds=statistics.fmean(seconds) if seconds else None,
        budget_s=results[0].budget_s,
        hardware=_hardware(results[0].environment),
        costs={key: value for key, value in trainings[0][0].costs.items() if value is not None},
        files=[item.file for item, _ in trainings],
    )


def difference_to_base(trainings: Sequence[FoundResult], base: Sequence[FoundResult]) -> Difference | str:
    """Compare trainings with equally long ones of the base row, of equal seed; a text says why that is not possible.

    Args:
        trainings: of the row.
        base: all results of the base row on the same task.
    """
    if not base:
        return "the base row is not run"
    by_training = {_comparable(item): item for item in sorted(base, key=lambda item: item.result.when)}
    pairs = [(item, by_training[_comparable(item)]) for item in trainings if _comparable(item) in by_training]
    if not pairs:
        return "no training of the base row is equally long, with the same seed and episodes"
    ours, theirs = ([_row(name, pair[side]) for pair in pairs] for side, name in enumerate(("row", "base")))
    with_means, notes = add_training_means([*theirs, *ours])
    comparisons = compare_with_first(with_means)
    if notes or not comparisons:
        return notes[0] if notes else "the accuracies of the episodes are not recorded"
    (pair,) = comparisons
    difference, ci95 = pair.over_trainings or (pair.paired.difference, pair.paired.ci95)
    return Difference(difference=difference, ci95=ci95, trainings=pair.trainings or 1, episodes=pair.paired.episodes)


def _comparable(item: FoundResult) -> tuple[object, ...]:
    """Equal for two trainings that differ in the settings of their rows only."""
    return item.seed, item.steps, tuple(item.costs.values()), item.result.protocol


def _row(name: str, item: FoundResult) -> Row:
    (task,) = (
        t for t in read_recorded(item.path) if (t.result.way, t.result.shot) == (item.result.way, item.result.shot)
    )
    (row,) = rows_of(f"{name}-seed{item.seed}", "results", item.file, [task])
    return row


def _hardware(environment: dict[str, object]) -> str:
    """GPU, or cores and name of the processor, as recorded by the evaluation."""
    if environment.get("gpu"):
        return str(environment["gpu"])
    cores, processor = environment.get("cores"), environment.get("processor")
    return f"{cores or '?'} cores, {processor}" if processor else ""
