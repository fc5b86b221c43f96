"""Probes of an encoder on labelled classes that it was not trained on: nearest neighbours, and a linear classifier.

Half of each class is the reference, the other half is asked about. Labels of the training classes are not used.
Notation: n images, F features.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng

NEIGHBOURS = 20
SHARPNESS = 1 / 0.07
"""Weight of a neighbour is exp(cosine * sharpness), as Wu et al. (CVPR 2018) have it."""
LINEAR_ROWS = 200
"""Images of a class that a linear probe takes at most, half of them to learn from."""


def knn_probe(h_nF: Tensor, labels: np.ndarray) -> float:
    """Share of images whose class a weighted vote of their nearest neighbours (cosine, faiss) names.

    Raises:
        DataError: a class has one image only.
    """
    import faiss

    unit = F.normalize(h_nF.float(), dim=1).cpu().numpy()
    reference, asked = _halves(labels)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit[reference])
    cosine, rows = index.search(unit[asked], min(NEIGHBOURS, len(reference)))
    classes, number = np.unique(labels, return_inverse=True)
    votes = np.zeros((len(asked), len(classes)))
    np.add.at(votes, (np.arange(len(asked))[:, None], number[reference][rows]), np.exp(cosine * SHARPNESS))
    return float((votes.argmax(axis=1) == number[asked]).mean())


def linear_probe(h_nF: Tensor, labels: np.ndarray) -> float:
    """Share of images that logistic regression on standardised features gets right.

    Raises:
        DataError: a class has one image only.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    h = h_nF.float().cpu().numpy()
    reference, asked = _halves(labels, LINEAR_ROWS)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe for comparison, not a result
        model.fit(h[reference], labels[reference])
    return float(model.score(h[asked], labels[asked]))


def _halves(labels: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to ask about: a seeded draw, half of each class."""
    reference, asked = [], []
    for number in np.unique(labels):
        rows = keyed_rng("probe", int(number)).permutation(np.flatnonzero(labels == number))[:most]
        if len(rows) < 2:
            raise DataError(f"class {number} has one image: a probe needs two or more; leave small classes out")
        half = len(rows) // 2
        reference.append(rows[:half])
        asked.append(rows[half:])
    return np.concatenate(reference), np.concatenate(asked)
