"""K-means: separated clusters, the fixed point of Lloyd's algorithm, scikit-learn, faiss, duplicates."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.metrics import adjusted_rand_score

from metagmvae.training.models import clustering
from metagmvae.training.models.clustering import k_means


def separated(n: int = 300, k: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((k, 5)) * 20
    labels = rng.integers(0, k, n)
    return centres[labels] + rng.standard_normal((n, 5)), labels


def overlapping(n: int = 400) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((n, 4)).astype(np.float32)


def inertia(x: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> float:
    return sum(float(np.square(point - centroids[label]).sum()) for point, label in zip(x, labels, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_separated_clusters_are_found(seed: int) -> None:
    x, truth = separated(seed=seed)
    labels, centroids = k_means(x, 6, seed)
    theirs = KMeans(6, n_init=10, random_state=0).fit(x.astype(np.float32))
    assert adjusted_rand_score(truth, labels) == 1.0
    assert inertia(x, labels, centroids) == pytest.approx(theirs.inertia_, rel=1e-4)
    assert labels.dtype == np.int64
    assert (centroids.dtype, centroids.shape) == (np.float32, (6, 5))


def test_result_is_a_fixed_point_of_lloyds_algorithm() -> None:
    """Each point has its nearest centroid, and each centroid is the mean of its points."""
    x = overlapping()
    labels, centroids = k_means(x, 7, 0, iterations=1_000)
    for point, label in zip(x, labels, strict=True):
        assert label == int(np.square(centroids - point).sum(axis=1).argmin())
    for j in range(7):
        assert centroids[j] == pytest.approx(x[labels == j].mean(axis=0), abs=2e-2)  # until movements are small


def test_inertia_is_that_of_scikit_learn() -> None:
    x = overlapping()
    ours = inertia(x, *k_means(x, 12, 0, restarts=10))
    theirs = KMeans(12, n_init=10, random_state=0).fit(x).inertia_
    assert ours == pytest.approx(theirs, rel=0.02)


def test_restarts_keep_the_best() -> None:
    x = overlapping()
    single = [inertia(x, *k_means(x, 12, 0, restarts=r)) for r in (1, 2, 4, 8)]
    assert single == sorted(single, reverse=True)
    assert single[-1] < single[0]


def test_seed_decides_the_result() -> None:
    x = overlapping()
    np.random.seed(1)
    first = k_means(x, 12, 5)
    np.random.seed(2)
    second, other = k_means(x, 12, 5), k_means(x, 12, 6)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


def test_faiss_gives_the_same_clusters() -> None:
    pytest.importorskip("faiss")
    x, _ = separated()
    x = x.astype(np.float32)
    init, _ = kmeans_plusplus(x, 6, random_state=0)
    labels, centroids = clustering._lloyd(x, init, 30)
    labels_faiss, centroids_faiss = clustering._lloyd_faiss(x, init, 30)
    assert np.array_equal(labels, labels_faiss)
    assert centroids == pytest.approx(centroids_faiss, abs=1e-4)


def test_fewer_different_points_than_clusters_leave_clusters_empty() -> None:
    x = np.repeat(np.eye(3), 4, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels, centroids = k_means(x, 5, 0)
    assert len(np.unique(labels)) == 3
    assert inertia(x, labels, centroids) == 0
    assert adjusted_rand_score(np.repeat(range(3), 4), labels) == 1.0


def test_every_point_its_own_cluster() -> None:
    x = overlapping(20)
    labels, centroids = k_means(x, 20, 0)
    assert sorted(labels) == list(range(20))
    assert inertia(x, labels, centroids) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("k", "message"), [(0, "0 clusters"), (41, "41 clusters needs at least as many points, not 40")]
)
def test_impossible_number_of_clusters(k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        k_means(overlapping(40), k, 0)


def test_features_that_are_not_finite() -> None:
    x = overlapping(40)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        k_means(x, 2, 0)


def test_centroids_of_a_sample_label_all_points() -> None:
    points = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    labels, centroids = k_means(points, 4, seed=1, points_per_cluster=20)
    distances = np.square(points[:, None] - centroids[None]).sum(axis=2)
    np.testing.assert_array_equal(labels, distances.argmin(axis=1))
    whole, _ = k_means(points, 4, seed=1)
    assert (labels != whole).any(), "the centroids are those of 80 of the 400 points"
    same, _ = k_means(points, 4, seed=1, points_per_cluster=100)
    np.testing.assert_array_equal(same, whole)
