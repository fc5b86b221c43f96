"""K-means, for the pseudo-labels of DeepCluster and the partitions of CACTUs.

Notation: n points, F feature size, k clusters.

scikit-learn is imported where it is used: every process of a training imports this module, few cluster.
"""

from __future__ import annotations

import warnings

import numpy as np

INIT_POINTS_PER_CLUSTER = 16
"""Points per cluster among which k-means++ chooses. With all points scikit-learn spends more time there than in the
iterations (distances in float64 of eight candidates for each centroid), and ends at a sum of squared distances that is
0.4% smaller (38,400 points of 1,600 values, 500 clusters)."""


def k_means(
    features_nF: np.ndarray,
    k: int,
    seed: int,
    *,
    restarts: int = 1,
    iterations: int = 100,
    points_per_cluster: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster by Lloyd's algorithm from initial centroids of k-means++ (Arthur and Vassilvitskii, 2007).

    The initial centroids are chosen among a random sample of the points. The result is a function of the arguments.
    Where faiss is installed and finds a GPU, it runs the iterations there, from the same initial centroids. A cluster
    that becomes empty gets a centroid elsewhere; clusters stay empty only if fewer than k of the points differ.

    Args:
        features_nF: points, (n, F); computed in float32.
        k: clusters, at most n.
        seed: of the initial centroids.
        restarts: initialisations; the clustering with the smallest sum of squared distances is returned.
        iterations: most iterations of each restart.
        points_per_cluster: the centroids are fitted to a random sample of this many points per cluster, as in faiss;
            None: to all points. The labels are those of all points.

    Returns:
        labels_n: cluster of each point, int64 in 0 to k - 1, (n,).
        centroids_kF: float32, (k, F).

    Raises:
        ValueError: k is not in 1 to n, or a feature is not finite.
    """
    from sklearn.cluster import kmeans_plusplus
    from sklearn.metrics import pairwise_distances_argmin

    x_nF = np.ascontiguousarray(features_nF, dtype=np.float32)
    if not 1 <= k <= len(x_nF):
        raise ValueError(f"k-means with {k} clusters needs at least as many points, not {len(x_nF)}; change one")
    if not np.isfinite(x_nF).all():
        raise ValueError("k-means: a feature is not finite; train the encoder again with a lower learning rate")
    lloyd = _lloyd_faiss if _faiss_has_gpu() else _lloyd
    random = np.random.RandomState(seed)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    fitted_mF = x_nF if points_per_cluster is None else _sample(x_nF, k * points_per_cluster, random)
    for _ in range(restarts):
        start_mF = _sample(fitted_mF, k * INIT_POINTS_PER_CLUSTER, random)
        init_kF, _indices = kmeans_plusplus(start_mF, k, random_state=random)
        labels_n, centroids_kF = lloyd(fitted_mF, init_kF, iterations)
        if len(fitted_mF) < len(x_nF):
            labels_n = pairwise_distances_argmin(x_nF, centroids_kF).astype(np.int64)
        inertia = float(np.square(x_nF - centroids_kF[labels_n]).sum(dtype=np.float64))
        if best is None or inertia < best[0]:
            best = inertia, labels_n, centroids_kF
    assert best is not None
    return best[1], best[2]


def _sample(x_nF: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """Random rows in their order; all rows if there are no more than `count`."""
    return x_nF if len(x_nF) <= count else x_nF[np.sort(random.permutation(len(x_nF))[:count])]


def _lloyd(x_nF: np.ndarray, init_kF: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and centroids from initial centroids, by scikit-learn."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer than k different points: documented
        result = KMeans(len(init_kF), init=init_kF, n_init=1, max_iter=iterations).fit(x_nF)
    return result.labels_.astype(np.int64), result.cluster_centers_


def _lloyd_faiss(x_nF: np.ndarray, init_kF: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by faiss, on all GPUs if its build has any."""
    import faiss

    n, k = len(x_nF), len(init_kF)
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": n}  # all points, without a warning
    result = faiss.Kmeans(x_nF.shape[1], k, niter=iterations, gpu=_faiss_has_gpu(), **limits)
    result.train(x_nF, init_centroids=init_kF)
    _, labels_n1 = result.index.search(x_nF, 1)
    return labels_n1[:, 0].astype(np.int64), np.asarray(result.centroids)


def _faiss_has_gpu() -> bool:
    try:
        import faiss
    except ImportError:
        return False
    return faiss.get_num_gpus() > 0
