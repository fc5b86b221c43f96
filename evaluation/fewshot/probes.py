"""Probes of an encoder on labelled classes: nearest neighbours, and a linear classifier.

Half of the images of each class are the reference, the other half are classified. Of a dataset with groups, such as
patients, the two halves are of different groups. The classes are those of the validation or test split; labels of the
training classes are not used.

Notation: n images, F features.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.pipelines.grouped_labels import EpisodeLabels, GroupedLabels, class_ids
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.group_draw import MIX

NEIGHBOURS = 20
SHARPNESS = 1 / 0.07
"""The vote of a neighbour has weight exp(cosine * sharpness), as in Wu et al. (CVPR 2018)."""
BLOCK_ROWS = 1024
"""Queries that are compared with all references at once."""
LINEAR_ROWS = 200
"""Most images of a class in a linear probe; half of them are the reference."""


def knn_probe(h_nF: Tensor, labels: EpisodeLabels) -> float:
    """Return the accuracy of a weighted vote of the nearest neighbours by cosine, a fraction in [0, 1].

    Raises:
        DataError: a class has only one image, or no class has images of two groups.
    """
    unit_nF = F.normalize(h_nF.float(), dim=1)
    reference, queries = (torch.as_tensor(rows, device=h_nF.device) for rows in _split(labels))
    classes, inverse = np.unique(class_ids(labels), return_inverse=True)
    class_n = torch.as_tensor(inverse, device=h_nF.device)
    reference_TF, correct = unit_nF[reference], 0
    for rows in queries.split(BLOCK_ROWS):
        cosine, neighbours = (unit_nF[rows] @ reference_TF.T).topk(min(NEIGHBOURS, len(reference)), dim=1)
        votes = torch.zeros(len(rows), len(classes), device=h_nF.device)
        votes.scatter_add_(1, class_n[reference][neighbours], (cosine * SHARPNESS).exp())
        correct += int((votes.argmax(dim=1) == class_n[rows]).sum())
    return correct / len(queries)


def linear_probe(h_nF: Tensor, labels: EpisodeLabels) -> float:
    """Return the accuracy of logistic regression on standardised features, a fraction in [0, 1].

    Raises:
        DataError: as `knn_probe`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, classes = h_nF.float().cpu().numpy(), class_ids(labels)
    reference, queries = _split(labels, LINEAR_ROWS)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the probe compares encoders; it is not a result
        model.fit(x[reference], classes[reference])
    return float(model.score(x[queries], classes[queries]))


def _split(labels: EpisodeLabels, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the reference and of the queries, as `_split_classes`; with groups, as `_split_groups`."""
    return _split_groups(labels, most) if isinstance(labels, GroupedLabels) else _split_classes(labels, most)


def _split_groups(labels: GroupedLabels, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Give each group, in seeded random order, to the half with fewer images; classes in one half only are left out."""
    sizes, images = np.bincount(labels.groups), [0, 0]
    half_of = np.zeros(len(sizes), np.int64)
    for group in keyed_rng("probe groups").permutation(len(sizes)):
        half_of[group] = int(images[1] < images[0])
        images[half_of[group]] += sizes[group]
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for class_id in np.unique(labels.classes):
        rows = keyed_rng("probe", int(class_id)).permutation(np.flatnonzero(labels.classes == class_id))[:most]
        parts = [rows[half_of[labels.groups[rows]] == half] for half in (0, 1)]
        if all(map(len, parts)):
            for half, part in zip(halves, parts, strict=True):
                half.append(part)
    if not halves[0]:
        raise DataError(f"no class has images of two groups for the probes; give more groups, or {MIX}")
    return np.concatenate(halves[0]), np.concatenate(halves[1])


def _split_classes(labels: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the reference and of the queries: a seeded random half of each class is the reference.

    Args:
        labels: classes, (n,).
        most: images that are drawn from each class; None: all.
    """
    reference, queries = [], []
    for class_id in np.unique(labels):
        rows = keyed_rng("probe", int(class_id)).permutation(np.flatnonzero(labels == class_id))[:most]
        if len(rows) < 2:
            raise DataError(f"class {class_id} has one image: a probe needs at least two; leave small classes out")
        half = len(rows) // 2
        reference.append(rows[:half])
        queries.append(rows[half:])
    return np.concatenate(reference), np.concatenate(queries)
