"""DeepCluster: whitening, clusters by epoch, weights by cluster size, a new classifier in each epoch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from pretraining_objectives import random_images, small_settings, small_step
from sklearn.decomposition import PCA

from metagmvae.pipelines.records import DataError
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.models.clustering import k_means
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.pretraining.deepcluster import DeepClusterModules, DeepClusterStep, whiten


def cluster_step(clusters: int = 5, dtype: torch.dtype = torch.float32) -> DeepClusterStep:
    step = small_step(DeepClusterStep, small_settings("deepcluster", clusters=clusters), dtype=dtype)
    assert isinstance(step, DeepClusterStep)
    return step


# --- whitening --------------------------------------------------------------------------------------------


def test_whitening_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    h = (rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)) + 3).astype(np.float32)
    theirs = PCA(4, whiten=True).fit_transform(h.astype(np.float64))
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = whiten(h, dimensions=4)
    # The sign of a component is free.
    assert np.abs(ours) == pytest.approx(np.abs(theirs), abs=2e-3)
    assert ours @ ours.T == pytest.approx(theirs @ theirs.T, abs=5e-3)


def test_constant_features_are_left_out() -> None:
    rng = np.random.default_rng(0)
    h = np.concatenate([rng.standard_normal((50, 3)), np.full((50, 4), 7.0)], axis=1).astype(np.float32)
    assert whiten(h).shape == (50, 3)
    assert np.linalg.norm(whiten(h), axis=1) == pytest.approx(np.ones(50), rel=1e-5)
    # A variance of 1e-8 of the largest is noise.
    assert whiten(h[:, :3] * np.array([1e4, 1, 1], dtype=np.float32)).shape == (50, 1)
    at_the_mean = np.array([[1, 0], [-1, 0], [0, 0]], dtype=np.float32)
    assert np.abs(whiten(at_the_mean))[:, 0].tolist() == [1, 1, 0]


def test_equal_features_have_no_clusters() -> None:
    with pytest.raises(ValueError, match="features of all images are equal"):
        whiten(np.ones((9, 4), dtype=np.float32))


# --- clusters ---------------------------------------------------------------------------------------------


def test_clusters_are_those_of_the_whitened_features_of_the_images_themselves() -> None:
    step, images = cluster_step(), random_images(40)
    step.encoder(torch.rand(8, 1, 8, 8))  # moves the running statistics, which the clustering uses
    step.start_step(1, images)
    features = encode_images(EncoderModel(step.encoder, (1, 8, 8)), images, torch.device("cpu"), raw=True)
    step.train()
    seed = int(torch.randint(2**31, (), generator=keyed_generator(torch.device("cpu"), 3, "clusters", 0)))
    expected, _ = k_means(whiten(features.numpy()), 5, seed, iterations=20)
    assert step.auxiliary.label_n.tolist() == expected.tolist()
    assert set(expected) == set(range(5))


def test_clusters_and_classifier_change_at_the_start_of_an_epoch_only() -> None:
    """40 images in batches of 8: an epoch has 5 steps."""
    step, images = cluster_step(), random_images(40)
    seen = []
    for number in range(1, 12):
        reset = list(step.start_step(number, images))
        assert bool(reset) == (number in (1, 6, 11))
        assert step.encoder.training
        seen.append((step.auxiliary.label_n.clone(), step.auxiliary.classifier.weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[4], strict=True))
    for first, second in ((0, 5), (5, 10)):  # other seeds, though the features are the same
        assert not any(torch.equal(a, b) for a, b in zip(seen[first], seen[second], strict=True))
    assert {id(p) for p in reset} == {id(p) for p in step.auxiliary.classifier.parameters()}


def test_classifier_starts_as_in_the_source() -> None:
    modules = DeepClusterModules(feature_dim=400, clusters=50, images=100)
    modules.reset_classifier(torch.Generator().manual_seed(0))
    assert float(modules.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert not modules.classifier.bias.detach().any()
    first = modules.classifier.weight.clone()
    modules.reset_classifier(torch.Generator().manual_seed(0))
    assert torch.equal(modules.classifier.weight, first)


def test_weights_equal_uniform_sampling_of_the_clusters() -> None:
    modules = DeepClusterModules(feature_dim=2, clusters=4, images=6)
    modules.set_clusters(np.array([0, 0, 0, 1, 3, 3]))  # cluster 2 is empty
    weights = modules.weight_k[modules.label_n.long()]
    assert weights.tolist() == pytest.approx([6 / 3 / 3] * 3 + [6 / 3 / 1] + [6 / 3 / 2] * 2)
    assert float(weights.mean()) == pytest.approx(1.0)
    total = Counter()
    for label, weight in zip(modules.label_n.tolist(), weights.tolist(), strict=True):
        total[label] += weight
    assert list(total.values()) == pytest.approx([2.0] * 3)


def test_loss_equals_its_formula() -> None:
    step, images = cluster_step(dtype=torch.float64), random_images(40)
    step.auxiliary.set_clusters(np.arange(40) % 7 % 5)
    rows = np.array([3, 17, 0, 39])
    x, labels, weights = step.prepare(images[rows], 2, rows)
    assert labels.tolist() == [3, 3, 0, 4]
    step.eval()
    loss, metrics = step.compute(x.double(), labels, weights)
    counts = Counter((np.arange(40) % 7 % 5).tolist())
    expected, hits = 0.0, 0
    for image, label in zip(x.double(), labels.tolist(), strict=True):
        logits = step.auxiliary.classifier(step.encoder(image[None]))[0].tolist()
        cross_entropy = math.log(sum(map(math.exp, logits))) - logits[label]
        expected += 40 / 5 / counts[label] * cross_entropy / 4
        hits += logits[label] == max(logits)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["cluster_accuracy"]) == hits / 4


def test_more_clusters_than_images() -> None:
    settings = small_settings("deepcluster", clusters=41)
    DeepClusterStep.check_images(settings, 41)
    with pytest.raises(DataError, match=r"pretrain.clusters \(41\) exceeds the 40 images of the split"):
        DeepClusterStep.check_images(settings, 40)
    with pytest.raises(DataError, match=r"pretrain.batch \(8\) exceeds the 7 images"):
        DeepClusterStep.check_images(small_settings("deepcluster", clusters=5), 7)
