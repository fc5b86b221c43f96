"""Baselines against plain loops on the same episodes."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from metagmvae.evaluation.fewshot import baselines
from metagmvae.evaluation.fewshot.baselines import (
    BASELINES,
    em,
    evaluate_encoder,
    logistic_regression,
    nearest_class_mean,
    soft_k_means,
)
from metagmvae.pipelines.sampling.episodes import EpisodeSampler
from metagmvae.training.objectives.mixture import class_log_posterior, fit_semi_supervised

LABELS = np.repeat(np.arange(8), 12)
TASK = {"way": 4, "shot": 2, "query": 5, "episodes": 6, "seed": 3}


def features(noise: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (8, 6))
    return torch.as_tensor(centres[LABELS] + noise * rng.normal(0, 1, (len(LABELS), 6)), dtype=torch.float32)


def unit(v: np.ndarray) -> np.ndarray:
    return v / math.sqrt(sum(float(a) ** 2 for a in v))


def test_nearest_class_mean_against_loops():
    x = features().numpy()
    sampler = EpisodeSampler(LABELS, way=4, shot=2, query=5, seed=3)
    accuracies = []
    for index in range(6):
        episode = sampler.episode(index)
        means = [unit(unit(x[a]) + unit(x[b])) for a, b in episode.support]
        correct = sum(
            int(np.argmax([unit(x[row]) @ mean for mean in means]) == k) for k in range(4) for row in episode.query[k]
        )
        accuracies.append(correct / 20)
    result = nearest_class_mean(features(), LABELS, **TASK)
    np.testing.assert_allclose(result.accuracies, accuracies)
    assert result.mode == "inductive"


def test_an_encoder_alone_is_evaluated_on_centred_features():
    x = features(noise=2.0) + 1
    expected = nearest_class_mean(x - x.mean(dim=0), LABELS, **TASK).accuracies
    assert evaluate_encoder(x, LABELS, **TASK).accuracies.tolist() == expected.tolist()
    assert nearest_class_mean(x, LABELS, **TASK).accuracies.tolist() != expected.tolist()


def test_logistic_regression_equals_scikit_learn_on_the_same_episode():
    x = features().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    episode = EpisodeSampler(LABELS, way=4, shot=2, query=5, seed=3).episode(0)
    model = LogisticRegression(C=3.0, max_iter=1000).fit(x[episode.support.reshape(-1)], np.repeat(range(4), 2))
    expected = model.score(x[episode.query.reshape(-1)], np.repeat(range(4), 5))
    result = logistic_regression(features(), LABELS, strength=3.0, **TASK | {"episodes": 1})
    assert result.accuracies.tolist() == pytest.approx([expected])


def test_soft_k_means_gains_from_the_queries_of_separated_classes():
    x = features(noise=0.6)
    task = TASK | {"shot": 1, "query": 11, "episodes": 100}
    assert soft_k_means(x, LABELS, **task).mean > nearest_class_mean(x, LABELS, **task).mean


@pytest.mark.parametrize("name", BASELINES)
def test_accuracies_do_not_depend_on_the_batches(name, monkeypatch):
    together = BASELINES[name](features(), LABELS, **TASK)
    monkeypatch.setattr(baselines, "VALUES_PER_BATCH", 1)
    np.testing.assert_array_equal(BASELINES[name](features(), LABELS, **TASK).accuracies, together.accuracies)


@pytest.mark.parametrize("e_step", ["identity", "diagonal"])
def test_em_at_a_temperature_on_one_episode(e_step):
    x = features()
    episode = EpisodeSampler(LABELS, way=4, shot=2, query=5, seed=3).episode(0)
    support, query = x[torch.as_tensor(episode.support)][None], x[torch.as_tensor(episode.query.reshape(-1))][None]
    mixture = fit_semi_supervised(support, query, iterations=10, e_step=e_step, temperature=9.0)
    predicted = class_log_posterior(mixture, query, e_step, 9.0)[0].argmax(dim=1).numpy()
    result = em(x, LABELS, e_step=e_step, temperature=9.0, **TASK | {"episodes": 1})
    assert result.accuracies.tolist() == pytest.approx([(predicted == np.repeat(range(4), 5)).mean()])
    assert result.mode == "transductive"


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_at_chance_on_noise_and_perfect_on_separated_classes(name):
    noise = torch.as_tensor(np.random.default_rng(2).normal(0, 1, (len(LABELS), 6)))
    task = TASK | {"episodes": 100}
    assert abs(BASELINES[name](noise, LABELS, **task).mean - 0.25) < 0.05
    assert BASELINES[name](features(noise=0.01), LABELS, **task).mean == 1


@pytest.mark.parametrize("name", BASELINES)
def test_images_are_classified_by_their_pixels(name):
    """Models that adapt on images give images instead of features."""
    vectors = features()
    images = vectors.view(-1, 1, 2, 3)
    np.testing.assert_array_equal(
        BASELINES[name](images, LABELS, **TASK).accuracies, BASELINES[name](vectors, LABELS, **TASK).accuracies
    )
