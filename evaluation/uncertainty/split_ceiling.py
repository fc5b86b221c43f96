"""The ceiling of few-shot accuracy on a split of a data set, for the features of a model (`alike_classes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.evaluate_tasks import check_task
from metagmvae.evaluation.fewshot.metrics import mean_ci95
from metagmvae.evaluation.uncertainty.alike_classes import (
    LEVEL,
    MOST_CORRECT,
    RANDOMISATIONS,
    alike_groups,
    ceiling_accuracies,
    check_enough_images,
    class_scores,
    drawing_names,
    expected_ceiling,
    find_alike,
)
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.default import default_device
from metagmvae.training.models.encoders import EncoderModel

CRITERION = (
    f"two classes count as alike if at most {MOST_CORRECT:.0%} of their images are closer, by cosine, to the mean of "
    "their own class (the image and the rotations of its drawing left out) and a randomisation test of the maximum "
    f"mean discrepancy does not reject equal distributions (p > {LEVEL}, {RANDOMISATIONS} randomisations)"
)


def split_ceiling(
    model: EncoderModel, dataset: Dataset, tasks: Sequence[Mapping[str, int]], split: str = "test"
) -> dict[str, Any]:
    """Return the alike classes of a split and the accuracies of an oracle and a reference on each task.

    Args:
        model: an encoder, the stronger the better: classes that it confuses may count as alike.
        dataset: images, or features made by the encoder of the model.
        tasks: mappings with way, shot, query, episodes and seed.
        split: whose classes are compared.

    Returns:
        `criterion`; numbers of `classes`, of `alike_classes`, of `alike_pairs`, and of those pairs that are rotations
        of one character (`rotation_pairs`); `groups`: names of the classes of each group. `rows`, for each task:
        `oracle`, `oracle_ci95` and `expected` (over all episodes), and `all_images_labelled` and its `…_ci95`, as in
        `ceiling_accuracies`; fractions in [0, 1].

    Raises:
        DataError: a class has only one image, or the data does not fit a task or the model.
    """
    index, labels = dataset.index(split), dataset.labels(split)
    check_enough_images(labels)
    for task in tasks:
        check_task(labels, task)
    h_nF = encode_split(model, dataset, split, default_device()).cpu()
    drawings, names = drawing_names(index["key"].to_pylist()), dataset.class_names(split)
    score_nc = class_scores(h_nF, labels, drawings)
    pairs = find_alike(h_nF, labels, drawings, score_nc)
    group_c = alike_groups(len(names), pairs)
    members = [np.flatnonzero(group_c == group).tolist() for group in np.flatnonzero(np.bincount(group_c) > 1)]
    characters = drawing_names(names)
    return {
        "criterion": CRITERION,
        "classes": len(names),
        "alike_classes": sum(map(len, members)),
        "alike_pairs": len(pairs),
        "rotation_pairs": sum(characters[pair.first] == characters[pair.second] for pair in pairs),
        "groups": [[names[class_id] for class_id in group] for group in members],
        "rows": [_row(task, labels, group_c, score_nc) for task in tasks],
    }


def _row(task: Mapping[str, int], labels: np.ndarray, group_c: np.ndarray, score_nc: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict(task)
    both = ceiling_accuracies(labels, group_c, score_nc, task)
    for name, accuracies in zip(("oracle", "all_images_labelled"), both, strict=True):
        row[name], row[f"{name}_ci95"] = mean_ci95(accuracies)
    return row | {"expected": expected_ceiling(group_c, task["way"])}
