"""Probabilities of the heads: those of the baselines for equal shots, and unequal shots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from metagmvae.evaluation.encoders.head_predictions import head_logits
from metagmvae.evaluation.encoders.heads import HEADS, MODES
from metagmvae.evaluation.fewshot.baselines import evaluate_batches
from metagmvae.infra.commands import encoder as options

WAY, SHOT, QUERY = 4, 3, 6
SETTINGS = {"em": {"e_step": "diagonal", "temperature": 2.0}, "soft-k-means": {"temperature": 7.0}}


def probabilities(head: str, settings: dict[str, Any], h_TF: Tensor, label_T: np.ndarray, h_PF: Tensor) -> np.ndarray:
    return torch.softmax(head_logits(head, settings, h_TF, label_T, h_PF), dim=1).numpy()


def features(seed: int = 0) -> tuple[Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), SHOT + QUERY)
    return torch.as_tensor(rng.normal(size=(len(labels), 5)) + 1.5 * rng.normal(size=(6, 5))[labels]).float(), labels


def test_names_in_the_help_are_the_heads() -> None:
    assert options.HEADS == tuple(HEADS) == tuple(MODES)


@pytest.mark.parametrize("head", HEADS)
def test_predicted_classes_are_those_of_the_evaluated_baseline(head: str) -> None:
    h_nF, labels = features()
    task = {"way": WAY, "shot": SHOT, "query": QUERY, "episodes": 5, "seed": 3}
    settings = SETTINGS.get(head, {})
    expected = HEADS[head].evaluate(h_nF, labels, **task, **settings)

    def classify(support_EKSF: Tensor, query_EPF: Tensor) -> Tensor:
        label_T = np.repeat(np.arange(WAY), SHOT)
        pairs = zip(support_EKSF.flatten(1, 2), query_EPF, strict=True)
        p = [probabilities(head, settings, support, label_T, query) for support, query in pairs]
        assert np.allclose(np.stack(p).sum(axis=2), 1)
        return torch.as_tensor(np.stack(p)).argmax(dim=2)

    actual = evaluate_batches(classify, MODES[head], h_nF, labels, **task)
    assert np.array_equal(actual.accuracies, expected.accuracies)
    assert expected.mean > 1 / WAY


@pytest.mark.parametrize("head", HEADS)
def test_unequal_shots_and_their_order(head: str) -> None:
    """A class with one labelled image more is not preferred for that; the order of the images does not matter."""
    rng = np.random.default_rng(1)
    centres = 4 * np.eye(3, 8)
    label_T = np.array([0, 0, 0, 0, 1, 2, 2])
    h_TF = torch.as_tensor(centres[label_T] + 0.1 * rng.normal(size=(7, 8))).float()
    truth = np.array([1, 1, 2, 0, 1, 2])
    h_PF = torch.as_tensor(centres[truth] + 0.1 * rng.normal(size=(6, 8))).float()
    p_PK = probabilities(head, {}, h_TF, label_T, h_PF)
    assert p_PK.argmax(axis=1).tolist() == truth.tolist()
    order = rng.permutation(7)
    shuffled = probabilities(head, {}, h_TF[torch.as_tensor(order)], label_T[order], h_PF)
    assert np.allclose(shuffled, p_PK, atol=1e-4)


def test_a_query_between_two_classes_of_unequal_shots_is_even() -> None:
    h_TF = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    p_PK = probabilities("logistic-regression", {}, h_TF, np.array([0, 0, 0, 1]), torch.tensor([[1.0, 1.0]]))
    assert p_PK == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("way", [2, 3])
def test_logistic_regression_gives_the_probabilities_of_scikit_learn(way: int) -> None:
    rng = np.random.default_rng(2)
    label_T = np.repeat(np.arange(way), np.arange(1, way + 1))
    h_TF, h_PF = (
        torch.as_tensor(rng.normal(size=(len(label_T), 4))).float(),
        torch.as_tensor(rng.normal(size=(6, 4))).float(),
    )
    unit_TF, unit_PF = (torch.nn.functional.normalize(h, dim=1).double().numpy() for h in (h_TF, h_PF))
    model = LogisticRegression(C=10.0, class_weight="balanced", tol=1e-9, max_iter=10_000).fit(unit_TF, label_T)
    expected = model.predict_proba(unit_PF)
    actual = probabilities("logistic-regression", {"strength": 10.0}, h_TF, label_T, h_PF)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
