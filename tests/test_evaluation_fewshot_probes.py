"""Probes on separated classes and on noise; the vote of the neighbours against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metagmvae.evaluation.fewshot.probes import _split_classes, _split_groups, knn_probe, linear_probe
from metagmvae.pipelines.grouped_labels import GroupedLabels
from metagmvae.pipelines.records import DataError


def blobs(spread: float, classes: int = 5, each: int = 40, size: int = 8) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes) * 3, each)
    centres = rng.standard_normal((classes, size)) * 3
    h = centres[labels // 3] + spread * rng.standard_normal((len(labels), size))
    return torch.as_tensor(h, dtype=torch.float32), labels


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_separated_classes_give_accuracy_1_and_shuffled_labels_chance(probe) -> None:
    assert probe(*blobs(0.1)) == 1.0
    h, labels = blobs(1.0, each=200)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert probe(h, shuffled) == pytest.approx(0.2, abs=0.06)


def test_vote_of_the_neighbours_equals_wu_et_al() -> None:
    h, labels = blobs(3.0)
    reference, queries = _split_classes(labels)
    unit = torch.nn.functional.normalize(h, dim=1).double().numpy()
    correct = 0
    for row in queries:
        cosine = np.array([float(unit[row] @ unit[other]) for other in reference])
        votes: dict[int, float] = {}
        for rank in np.argsort(-cosine)[:20]:
            label = labels[reference[rank]]
            votes[label] = votes.get(label, 0) + np.exp(cosine[rank] / 0.07)
        correct += max(votes, key=lambda label: votes[label]) == labels[row]
    assert knn_probe(h, labels) == pytest.approx(correct / len(queries))
    assert 0.3 < correct / len(queries) < 1


def test_reference_and_queries_are_disjoint_halves_of_each_class() -> None:
    labels = np.repeat([4, 7], [9, 20])
    reference, queries = _split_classes(labels, most=10)
    assert len(set(reference) | set(queries)) == len(reference) + len(queries) == 19
    assert np.bincount(labels[reference])[[4, 7]].tolist() == [4, 5]
    with pytest.raises(DataError, match="class 3 has one image"):
        _split_classes(np.array([3, 4, 4]))


def tinted(rng: np.random.Generator) -> tuple[torch.Tensor, GroupedLabels]:
    """Noise, the same for all images of a group; each class has 6 groups of 10 images, and class 4 one of 60."""
    groups = np.where(np.arange(300) < 240, np.arange(300) // 10, 24)
    h = rng.standard_normal((25, 256))[groups] + 0.01 * rng.standard_normal((300, 256))
    return torch.as_tensor(h, dtype=torch.float32), GroupedLabels(np.arange(300) // 60, groups, list("abcde"))


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_the_halves_are_of_different_groups(probe) -> None:
    h, labels = tinted(np.random.default_rng(0))
    assert probe(h, labels.classes) > 0.95
    assert probe(h, labels) < 0.6
    for most in (None, 20):
        reference, queries = _split_groups(labels, most)
        assert not set(labels.groups[reference]) & set(labels.groups[queries])
        assert set(labels.classes[reference]) == set(labels.classes[queries]) == {0, 1, 2, 3}  # class 4 is left out
    assert abs(len(reference) - len(queries)) < 40
    one = GroupedLabels(labels.classes, labels.classes, labels.class_names)
    with pytest.raises(DataError, match="no class has images of two groups for the probes; give more groups, or draw"):
        probe(h, one)
