"""CACTUs: tasks whose classes are clusters of an embedding (Hsu, Levine and Finn, ICLR 2019, Algorithm 1).

Each of P partitions is a k-means clustering of the embedding with its dimensions scaled by random factors, which gives
diverse partitions (section 2.3 of the paper).

Notation: n images, F feature size, P partitions.
"""

from __future__ import annotations

import numpy as np

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.training.device import distributed
from metagmvae.training.models.clustering import k_means

COST = {"iterations": 25, "points_per_cluster": 64}
"""Limits of k-means: with all points and up to 100 iterations, 100 partitions of Omniglot take hours of a CPU core."""


def feature_partitions(features_nF: np.ndarray, settings: MethodSettings, seed: int) -> np.ndarray:
    """Cluster the embedding P times; return the clusters of all images in each partition, int16 or int32, (P, n).

    Each rank computes some of the partitions, and all ranks return the same ones.

    Args:
        features_nF: embedding of the training images.
        settings: `clusters` and `partitions`. With one partition the dimensions are not scaled.
        seed: of the scales and of k-means.

    Raises:
        DataError: there are fewer images than clusters.
    """
    n, F = features_nF.shape
    check_clusters(n, settings)
    rank, world = distributed.rank(), distributed.world_size()
    labels_Pn = np.zeros((settings.partitions, n), dtype=np.int16 if settings.clusters <= 2**15 else np.int32)
    for partition in range(rank, settings.partitions, world):
        scale_F = partition_scale(F, settings.partitions, seed, partition)
        labels_Pn[partition], _ = k_means(features_nF * scale_F, settings.clusters, seed=partition, **COST)
    for partition in range(settings.partitions):
        # Neither gloo nor nccl sends int16.
        labels_Pn[partition] = distributed.from_rank(labels_Pn[partition].astype(np.int32), partition % world)
    return labels_Pn


def check_clusters(images: int, settings: MethodSettings) -> None:
    """Check that each cluster can have as many images as a task takes of it.

    Raises:
        DataError: there are too few images.
    """
    needed = settings.way * (settings.shot + settings.query)
    if images < max(settings.clusters, needed):
        raise DataError(
            f"method.clusters is {settings.clusters} and a task has {needed} images, but there are only {images} "
            "training images; lower method.clusters, method.way, method.shot or method.query"
        )


def partition_scale(F: int, partitions: int, seed: int, partition: int) -> np.ndarray:
    """Random factors of the dimensions, uniform in [0, 1], (F,); ones for a single partition."""
    if partitions == 1:
        return np.ones(F, dtype=np.float32)
    return keyed_rng("partition", seed, partition).uniform(size=F).astype(np.float32)
