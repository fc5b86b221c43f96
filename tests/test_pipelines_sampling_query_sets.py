"""Queries that are balanced, drawn from a Dirichlet distribution, or of classes without labelled images."""

import numpy as np
import pytest

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.sampling.episodes import EpisodeSampler, query_positions
from metagmvae.pipelines.sampling.query_sets import QuerySampler

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 400))
TASK = {"way": 5, "shot": 2, "query": 6, "seed": 3}


def classes_of(support: np.ndarray) -> np.ndarray:
    return LABELS[support[:, 0]]


@pytest.mark.parametrize("unbalanced", [False, True])
def test_without_a_distribution_the_episodes_are_those_of_the_episode_sampler(unbalanced):
    support, query, truth = QuerySampler(LABELS, **TASK, unbalanced=unbalanced).batch(4, 3)
    expected_support, expected_query = EpisodeSampler(LABELS, **TASK).batch(4, 3)
    positions = query_positions(5, 6, unbalanced)
    np.testing.assert_array_equal(support, expected_support)
    np.testing.assert_array_equal(query, expected_query.reshape(3, -1)[:, positions])
    np.testing.assert_array_equal(truth, np.tile(positions // 6, (3, 1)))


@pytest.mark.parametrize("options", [{"dirichlet": 0.5}, {"open_classes": 3}, {"dirichlet": 2.0, "open_classes": 1}])
def test_truth_is_the_class_and_no_query_is_a_labelled_image(options):
    sampler = QuerySampler(LABELS, **TASK, **options)
    for support, query, truth in zip(*sampler.batch(0, 20), strict=True):
        classes = classes_of(support)
        known = truth < 5
        np.testing.assert_array_equal(LABELS[query[known]], classes[truth[known]])
        others = LABELS[query[~known]]
        assert not np.isin(others, classes).any()
        assert len(np.unique(others)) == options.get("open_classes", 0)
        assert len(np.unique(np.concatenate([query, support.reshape(-1)]))) == len(query) + 10
        assert known.sum() == 30
        assert len(query) == sampler.queries


def test_an_episode_depends_on_seed_and_index_only():
    one, two = (QuerySampler(LABELS, **TASK, dirichlet=1.0, open_classes=2) for _ in range(2))
    whole = one.batch(0, 6)
    for part, expected in zip(two.batch(4, 2), whole, strict=True):
        np.testing.assert_array_equal(part, expected[4:])
    other = QuerySampler(LABELS, **(TASK | {"seed": 4}), dirichlet=1.0).batch(0, 6)
    assert not np.array_equal(other[1], whole[1][:, :30])


@pytest.mark.parametrize("alpha", [0.3, 2.0, 50.0])
def test_counts_have_the_moments_of_the_dirichlet_multinomial(alpha):
    """Mean P/K; variance P pi (1 - pi) (P + A) / (1 + A) with pi = 1/K, A = K alpha (Johnson, Kotz, Balakrishnan)."""
    sampler = QuerySampler(LABELS, **TASK, dirichlet=alpha)
    truth = sampler.batch(0, 3000)[2]
    counts = np.stack([(truth == k).sum(axis=1) for k in range(5)], axis=1)
    variance = 30 * 0.2 * 0.8 * (30 + 5 * alpha) / (1 + 5 * alpha)
    np.testing.assert_allclose(counts.mean(axis=0), 6, atol=4 * np.sqrt(variance / 3000))
    np.testing.assert_allclose(counts.var(axis=0).mean(), variance, rtol=0.08)
    assert sampler.capped == 0


def test_a_class_gives_no_more_queries_than_it_has_images():
    labels = np.repeat(np.arange(5), 8)  # 6 images left in each class, and 30 queries: all of them
    sampler = QuerySampler(labels, **TASK, dirichlet=0.1)
    truth = sampler.batch(0, 10)[2]
    np.testing.assert_array_equal(truth, np.tile(np.repeat(np.arange(5), 6), (10, 1)))
    assert sampler.capped == 10
    some = QuerySampler(np.repeat(np.arange(5), 12), **TASK, dirichlet=1e-6).batch(0, 50)[2]
    counts = np.stack([(some == k).sum(axis=1) for k in range(5)], axis=1)
    assert counts.max() == 10
    assert (counts.sum(axis=1) == 30).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dirichlet": 0.0}, "alpha of the Dirichlet distribution is 0"),
        ({"dirichlet": float("nan")}, "alpha of the Dirichlet distribution is nan"),
        ({"dirichlet": 1.0, "unbalanced": True}, "choose one"),
        ({"open_classes": 8}, "way 5 and 8 classes without labelled images exceed the 12 classes"),
        ({"open_classes": -1}, "-1 classes"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        QuerySampler(LABELS, **TASK, **options)
