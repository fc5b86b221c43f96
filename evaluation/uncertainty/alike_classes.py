"""The ceiling of few-shot accuracy on a split: classes whose images cannot be told apart, and what they cost.

A ring turned by 90 degrees is the same ring; where rotations are classes of their own, no classifier can tell these
two. A pair of classes counts as **alike** if both hold for the features of a strong encoder:

1. Each image against the mean features of the two classes (by cosine, the image and the rotations of its drawing left
   out of the means): at most `MOST_CORRECT` of the images are closer to their own class. Other pairs are told apart.
2. A randomisation test does not reject that the images of both have one distribution (p > `LEVEL`). The statistic is
   the squared maximum mean discrepancy (Gretton et al., JMLR 2012, Eq. 3) with a Gaussian kernel on normalised
   features, whose squared width is the median squared distance. Images are exchanged between the classes at random;
   where each class has the same drawings, only an image with the rotation of its own drawing, which makes the test
   exact for a rotation that changes nothing.

A test that does not reject is no proof: with few images, classes that differ a little count as alike.

Notation: n images, F features, c classes, N images of a pair of classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sampling.query_sets import QuerySampler

MOST_CORRECT = 0.9
LEVEL = 0.05
RANDOMISATIONS = 1999
_ROTATION = re.compile(r"(.+)@(?:000|090|180|270)")


@dataclass(frozen=True)
class AlikePair:
    """Two classes that count as alike."""

    first: int
    second: int
    correct: float
    """Fraction of the images that are closer to the mean of their own class (step 1)."""
    p: float
    """Of the randomisation test (step 2)."""


def class_scores(h_nF: Tensor, labels: np.ndarray, drawings: Sequence[str]) -> Tensor:
    """Cosine of each image to the mean of each class, (n, c), without the image and its rotations in the means.

    Args:
        h_nF: features.
        labels: class ids, 0 to c - 1; each class has at least two images.
        drawings: images of equal names are rotations of one drawing.
    """
    unit_nF, label_n = F.normalize(h_nF.float(), dim=1), torch.as_tensor(labels)
    total_cF = unit_nF.new_zeros(int(label_n.max()) + 1, unit_nF.shape[1]).index_add_(0, label_n, unit_nF)
    score_nc = unit_nF @ F.normalize(total_cF, dim=1).T
    image, other = (torch.as_tensor(rows) for rows in _same_drawing(drawings))
    for i, j in zip(image.split(4096), other.split(4096), strict=True):
        without = F.normalize(total_cF[label_n[j]] - unit_nF[j], dim=1)
        score_nc[i, label_n[j]] = (unit_nF[i] * without).sum(dim=1)
    return score_nc


def find_alike(h_nF: Tensor, labels: np.ndarray, drawings: Sequence[str], score_nc: Tensor) -> list[AlikePair]:
    """Find all pairs of classes that are alike by the criterion above; `score_nc` is the result of `class_scores`."""
    label_n = torch.as_tensor(labels)
    own_n1 = score_nc.gather(1, label_n[:, None])
    count_c = label_n.bincount().float()
    won_cc = torch.zeros(len(count_c), len(count_c)).index_add_(0, label_n, (own_n1 > score_nc).float())
    correct_cc = (won_cc + won_cc.T) / (count_c[:, None] + count_c)
    pairs = (correct_cc <= MOST_CORRECT).triu(diagonal=1).nonzero().tolist()
    unit_nF = F.normalize(h_nF.double(), dim=1)
    names, members = np.asarray(drawings), [np.flatnonzero(labels == k) for k in range(len(count_c))]
    found = []
    for first, second in pairs:
        rows = [members[k][np.argsort(names[members[k]], kind="stable")] for k in (first, second)]
        same = np.array_equal(*(names[r] for r in rows))
        p = equal_distribution_p(unit_nF[rows[0]], unit_nF[rows[1]], same, (0, first, second))
        if p > LEVEL:
            found.append(AlikePair(first, second, float(correct_cc[first, second]), p))
    return found


def equal_distribution_p(x_aF: Tensor, y_bF: Tensor, in_pairs: bool, key: tuple[int, ...]) -> float:
    """p value of the randomisation test of step 2: small if the two sets of points have different distributions.

    Args:
        x_aF: points of one class, at least two.
        y_bF: points of the other class, at least two.
        in_pairs: exchange x_i with y_i only, instead of all points with each other.
        key: of the random numbers.
    """
    points_NF = torch.cat([x_aF, y_bF])
    squared_NN = torch.cdist(points_NF, points_NF).square()
    off = ~torch.eye(len(points_NF), dtype=torch.bool)
    kernel_NN = torch.exp(-0.5 * squared_NN / squared_NN[off].median().clamp_min(1e-12)) * off
    rng, a, b = keyed_rng("alike", *key), len(x_aF), len(y_bF)
    if in_pairs:
        flip_RA = rng.integers(0, 2, (RANDOMISATIONS, a))
        in_first_RN = np.concatenate([1 - flip_RA, flip_RA], axis=1)
    else:
        in_first_RN = rng.permuted(np.tile(np.arange(a + b) < a, (RANDOMISATIONS, 1)), axis=1)
    in_first_RN = np.concatenate([(np.arange(a + b) < a)[None], in_first_RN])  # the classes as they are come first
    z_RN = torch.as_tensor(in_first_RN, dtype=kernel_NN.dtype)
    within, between = (((z @ kernel_NN) * w).sum(dim=1) for z, w in ((z_RN, z_RN), (z_RN, 1 - z_RN)))
    rest = (((1 - z_RN) @ kernel_NN) * (1 - z_RN)).sum(dim=1)
    discrepancy_R = within / (a * (a - 1)) + rest / (b * (b - 1)) - 2 * between / (a * b)
    slack = 1e-12 * kernel_NN.abs().sum()  # equal up to rounding counts as equal
    return float((discrepancy_R >= discrepancy_R[0] - slack).double().mean())


def alike_groups(classes: int, pairs: Sequence[AlikePair]) -> np.ndarray:
    """Group of each class, (c,): classes that are alike, or both alike to others of the group, share one."""
    edges = np.array([(pair.first, pair.second) for pair in pairs], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(classes, classes))
    return connected_components(graph, directed=False)[1]


def ceiling_accuracies(
    labels: np.ndarray, group_c: np.ndarray, score_nc: Tensor, task: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of an oracle and of a reference on the episodes of a task with balanced queries, (episodes,) each.

    The oracle knows the group of every query, and guesses between the classes of the episode that belong to it: its
    expected accuracy is the number of different groups among the K classes, divided by K. The reference is the nearest
    class mean where all other images of each class of the episode are labelled (`class_scores`): a reference, which
    methods that use the balance of the queries can exceed.
    """
    sampler = QuerySampler(labels, way=task["way"], shot=task["shot"], query=task["query"], seed=task["seed"])
    guess, nearest = [], []
    for index in range(task["episodes"]):
        support_1KS, query_1P, truth_1P = sampler.batch(index, 1)
        classes_K = labels[support_1KS[0, :, 0]]
        guess.append(len(np.unique(group_c[classes_K])) / task["way"])
        score_PK = score_nc[torch.as_tensor(query_1P[0])][:, torch.as_tensor(classes_K)]
        nearest.append((score_PK.argmax(dim=1).numpy() == truth_1P[0]).mean())
    return np.array(guess), np.array(nearest)


def expected_ceiling(group_c: np.ndarray, way: int) -> float:
    """Mean accuracy of the oracle of `ceiling_accuracies` over all possible episodes: the sum over the groups of
    the probability that at least one of its classes is among the K, divided by K."""
    c = len(group_c)
    sizes = np.bincount(group_c).tolist()
    return float(sum(1 - math.comb(c - size, way) / math.comb(c, way) for size in sizes) / way)


def drawing_names(keys: Sequence[str]) -> list[str]:
    """Names of the drawings of images: the key without its rotation, such as `@090`."""
    return [match[1] if (match := _ROTATION.fullmatch(key)) else key for key in keys]


def check_enough_images(labels: np.ndarray) -> None:
    """Refuse classes of one image: their mean without the image does not exist.

    Raises:
        DataError: there are some.
    """
    if (single := np.flatnonzero(np.bincount(labels) < 2)).size:
        raise DataError(f"class {single[0]} has one image: a ceiling needs two of each class; leave small classes out")


def _same_drawing(drawings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of images of one drawing, each image with itself among them: rows of both, (pairs,) each."""
    drawing_n = np.unique(np.asarray(drawings), return_inverse=True)[1]
    order = np.argsort(drawing_n, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(drawing_n[order])) + 1)
    return np.concatenate([np.repeat(p, len(p)) for p in parts]), np.concatenate([np.tile(p, len(p)) for p in parts])
