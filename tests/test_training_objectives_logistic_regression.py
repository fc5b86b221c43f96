"""Batched logistic regression against scikit-learn and its own optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from metagmvae.pipelines.records import DataError
from metagmvae.training.objectives import logistic_regression
from metagmvae.training.objectives.logistic_regression import logistic_regression_logits


def tasks(way: int, shot: int, size: int, episodes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes of unit vectors: (E, K, S, F) and (E, P, F)."""
    generator = torch.Generator().manual_seed(way)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    centres = draw(episodes, way, 1, size)
    points = torch.nn.functional.normalize(centres + 2 * draw(episodes, way, shot + 4, size), dim=3)
    return points[:, :, :shot], points[:, :, shot:].flatten(1, 2)


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
@pytest.mark.parametrize(("way", "shot", "size"), [(2, 3, 5), (3, 1, 40), (5, 5, 8), (20, 1, 12), (1, 2, 3)])
def test_probabilities_equal_those_of_scikit_learn(way: int, shot: int, size: int, strength: float) -> None:
    """With fewer and with more features than labelled points; of one class, which scikit-learn refuses, they are 1."""
    support, query = tasks(way, shot, size)
    probabilities = torch.softmax(logistic_regression_logits(support, query, strength), dim=2)
    labels = np.repeat(np.arange(way), shot)
    for e in range(len(support)):
        if way == 1:
            expected = np.ones((query.shape[1], 1))
        else:
            model = LogisticRegression(C=strength, max_iter=100_000, tol=1e-9)
            model.fit(support[e].flatten(0, 1).double().numpy(), labels)
            expected = model.predict_proba(query[e].double().numpy())
        np.testing.assert_allclose(probabilities[e].numpy(), expected, rtol=0, atol=1e-5)


def test_equal_points_of_two_classes_and_repeated_points() -> None:
    """The Gram matrix of the points is singular."""
    point = torch.tensor([0.6, 0.8])
    support = point.expand(1, 3, 2, 2)
    probabilities = torch.softmax(logistic_regression_logits(support, point.expand(1, 1, 2), 10.0), dim=2)
    torch.testing.assert_close(probabilities, torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))


def test_episodes_do_not_depend_on_each_other() -> None:
    """An easy and a hard task: the first one stops early."""
    support, query = tasks(5, 4, 10, episodes=2)
    support[0] *= 0.01
    together = logistic_regression_logits(support, query, 50.0)
    for e in range(2):
        alone = logistic_regression_logits(support[e : e + 1], query[e : e + 1], 50.0)
        torch.testing.assert_close(together[e], alone[0], rtol=0, atol=1e-12)


def test_a_fit_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    support, query = tasks(3, 2, 4)
    monkeypatch.setattr(logistic_regression, "NEWTON_STEPS", 1)
    with pytest.raises(DataError, match="strength 2 did not converge in 1 steps"):
        logistic_regression_logits(support, query, 2.0)
    monkeypatch.undo()
    support[1, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        logistic_regression_logits(support, query, 2.0)
