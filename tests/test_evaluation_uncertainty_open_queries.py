"""Queries of no labelled class: the search for a level, thresholds, and what is measured."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures
from metagmvae.evaluation.uncertainty.background import known_score, search_background
from metagmvae.evaluation.uncertainty.open_queries import BASELINES, best_threshold, evaluate_open_baselines

TASK = {"way": 3, "shot": 1, "query": 4, "episodes": 20, "seed": 0, "open_classes": 2}


@pytest.mark.parametrize("edge", [-7.6, -10.4])
def test_search_finds_a_level_of_the_highest_accuracy(edge: float):
    """Known queries score above the edge, the others at least 0.4 below it: only the third and finest grid finds it, in
    both cases on another side of the best level of the first grid."""
    rng = np.random.default_rng(0)
    density = np.concatenate([rng.uniform(edge, 0, 300), rng.uniform(-40, edge - 0.4, 300)])
    labels = np.repeat([0, 1], 300)

    def classify(level: float):
        logits = np.stack([density, np.full(600, level)], axis=1)
        return logits - np.logaddexp(logits[:, :1], logits[:, 1:]), labels

    level, log_p, _ = search_background(classify)
    assert density[300:].max() <= level <= density[:300].min()
    assert (log_p.argmax(axis=1) == labels).all()
    np.testing.assert_allclose(known_score(log_p), density - level)


def test_threshold_is_the_best_of_all_cuts():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 200)
    predicted = np.where(rng.random(200) < 0.8, truth, rng.integers(0, 3, 200)) % 3
    score = rng.normal(size=200) + (truth < 3)
    threshold = best_threshold(predicted, score, truth, way=3)
    accuracy = [(np.where(score < cut, 3, predicted) == truth).mean() for cut in [*np.sort(score), np.inf]]
    assert (np.where(score < threshold, 3, predicted) == truth).mean() == max(accuracy)


def split(name: str, seed: int, spread: float) -> SplitFeatures:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(8), 6)
    centres = rng.normal(size=(8, 16))
    x = centres[labels] + spread * rng.normal(size=(48, 16))
    return SplitFeatures(name, labels, {"scaled": torch.tensor(x, dtype=torch.float32)})


def test_baselines_on_separated_classes_and_on_noise():
    task = TASK | {"unbalanced": False, "dirichlet": None}  # as the command gives them
    separated = list(evaluate_open_baselines(split("test", 0, 0.01), split("validation", 1, 0.01), task))
    assert [result.name for result in separated] == list(BASELINES)
    for result in separated:
        row = result.summary()
        assert row["accuracy"] > 0.9, result.name  # queries of no class can move the classes of transductive baselines
        if result.mode == "inductive":
            assert row["accuracy"] == 1
            assert row["auroc"] > 0.99, result.name
            assert row["open_accuracy"] > 0.9, result.name
        assert row["settings"]["validation_accuracy"] <= 1
        assert not {"unbalanced", "dirichlet"} & row.keys()
    for result in evaluate_open_baselines(split("test", 0, 100.0), split("validation", 1, 100.0), TASK):
        assert result.known.mean() == pytest.approx(1 / 3, abs=0.12), result.name
        assert result.auroc == pytest.approx(0.5, abs=0.12), result.name


def test_auroc_is_that_of_the_queries_in_one_pool():
    (result, *_) = evaluate_open_baselines(split("test", 3, 1.0), split("validation", 1, 1.0), TASK)
    from metagmvae.evaluation.uncertainty.open_queries import _answers

    data = split("test", 3, 1.0)
    predicted, score, truth = _answers("nearest class mean", {}, data.by_kind["scaled"], data.labels, TASK)
    assert result.auroc == roc_auc_score((truth < 3).ravel(), score.ravel())
    known = [(p[t < 3] == t[t < 3]).mean() for p, t in zip(predicted, truth, strict=True)]
    np.testing.assert_allclose(result.known, known)
    threshold = result.settings["threshold"]
    answered = np.where(score < threshold, 3, predicted)
    np.testing.assert_allclose(result.all, (answered == truth).mean(axis=1))


def test_score_of_a_query_follows_from_the_scores_of_its_classes():
    scores = np.random.default_rng(0).normal(size=(2, 3, 4))
    for name, of_classes in {
        "nearest class mean": max,
        "logistic regression": lambda row: max(row) - np.log(sum(np.exp(value) for value in row)),
        "soft k-means": max,
        "EM on features, identity": lambda row: np.log(sum(np.exp(value) for value in row)),
    }.items():
        expected = [[of_classes(row) for row in episode] for episode in scores]
        np.testing.assert_allclose(BASELINES[name](torch.as_tensor(scores)), expected)
