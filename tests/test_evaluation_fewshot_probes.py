"""Probes: on separated classes all is right, on noise chance; the vote of neighbours against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metagmvae.evaluation.fewshot.probes import _halves, knn_probe, linear_probe
from metagmvae.pipelines.records import DataError


def blobs(spread: float, classes: int = 5, each: int = 40, size: int = 8) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes) * 3, each)
    centres = rng.standard_normal((classes, size)) * 3
    h = centres[labels // 3] + spread * rng.standard_normal((len(labels), size))
    return torch.as_tensor(h, dtype=torch.float32), labels


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_separated_classes_are_found_and_noise_is_chance(probe) -> None:
    assert probe(*blobs(0.1)) == 1.0
    h, labels = blobs(1.0, each=200)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert probe(h, shuffled) == pytest.approx(0.2, abs=0.06)


def test_neighbours_vote_as_wu_et_al_say() -> None:
    h, labels = blobs(3.0)
    reference, asked = _halves(labels)
    unit = torch.nn.functional.normalize(h, dim=1).double().numpy()
    right = 0
    for row in asked:
        cosine = np.array([float(unit[row] @ unit[other]) for other in reference])
        votes: dict[int, float] = {}
        for place in np.argsort(-cosine)[:20]:
            votes[labels[reference[place]]] = votes.get(labels[reference[place]], 0) + np.exp(cosine[place] / 0.07)
        right += max(votes, key=lambda name: votes[name]) == labels[row]
    assert knn_probe(h, labels) == pytest.approx(right / len(asked))
    assert 0.3 < right / len(asked) < 1


def test_halves_are_disjoint_and_hold_every_class() -> None:
    labels = np.repeat([4, 7], [9, 20])
    reference, asked = _halves(labels, most=10)
    assert len(set(reference) | set(asked)) == len(reference) + len(asked) == 19
    assert np.bincount(labels[reference])[[4, 7]].tolist() == [4, 5]
    with pytest.raises(DataError, match="class 3 has one image"):
        _halves(np.array([3, 4, 4]))
