"""The partitions of CACTUs: k-means of scaled dimensions, computed once, by all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_tasks
import torch
import torch.distributed as dist
from rank_processes import run_on_two_ranks
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from small_runs import FolderContext, assert_equal

from metagmvae.configs.method_settings import MethodSettings
from metagmvae.pipelines.records import DataError
from metagmvae.training.methods import cactus
from metagmvae.training.methods.cactus import feature_partitions, partition_scale
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import TrainState
from metagmvae.training.trainer.stages import train


def settings(**changes: int) -> MethodSettings:
    return MethodSettings(**{"way": 2, "shot": 1, "query": 2, "clusters": 4, "partitions": 3} | changes)


def separated(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four clusters of 25 points in 6 dimensions, far apart in every dimension: features and clusters."""
    rng = np.random.default_rng(seed)
    label_n = rng.permutation(np.repeat(np.arange(4), 25))
    centre_kF = np.stack([rng.permutation(4) for _ in range(6)], axis=1) * 20.0
    return (centre_kF[label_n] + rng.normal(size=(100, 6))).astype(np.float32), label_n


def test_partitions_of_separated_clusters_are_those_of_scikit_learn() -> None:
    features_nF, label_n = separated()
    theirs = KMeans(4, n_init=10, random_state=0).fit(features_nF).labels_
    partitions = feature_partitions(features_nF, settings(partitions=5), seed=0)
    assert len(partitions) == 5
    for labels in partitions:
        assert labels.dtype == np.int16
        assert set(labels) == {0, 1, 2, 3}
    scores = [adjusted_rand_score(theirs, labels) for labels in partitions]
    assert adjusted_rand_score(theirs, label_n) == 1
    # K-means from one initialisation may end in a local optimum, and a dimension may be scaled to nearly 0.
    assert sorted(scores)[2] == 1


def test_each_partition_is_k_means_with_its_own_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(features_nF: np.ndarray, k: int, seed: int, **_: int) -> tuple[np.ndarray, None]:
        seen.append((features_nF, k, seed))
        return np.arange(len(features_nF), dtype=np.int64) % k, None

    monkeypatch.setattr(cactus, "k_means", recorded)
    features_nF, _ = separated()
    feature_partitions(features_nF, settings(), seed=5)
    scales = [partition_scale(6, 3, 5, partition) for partition in range(3)]
    for (x_nF, k, _), scale_F in zip(seen, scales, strict=True):
        assert k == 4
        assert np.array_equal(x_nF, features_nF * scale_F)
    assert len({seed for _, _, seed in seen}) == 3
    seen.clear()
    feature_partitions(features_nF, settings(partitions=1), seed=5)
    assert np.array_equal(seen[0][0], features_nF)  # one partition: not scaled


def test_scales_are_uniform_and_depend_on_seed_and_partition() -> None:
    scale_F = partition_scale(100_000, 2, 0, 0)
    assert scale_F.dtype == np.float32
    assert 0 <= scale_F.min() < 1e-3
    assert 1 - 1e-3 < scale_F.max() <= 1
    assert np.quantile(scale_F, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    assert np.array_equal(scale_F, partition_scale(100_000, 9, 0, 0))
    assert not np.array_equal(scale_F, partition_scale(100_000, 2, 0, 1))
    assert not np.array_equal(scale_F, partition_scale(100_000, 2, 1, 0))
    assert partition_scale(3, 1, 0, 0).tolist() == [1, 1, 1]


def test_partitions_are_a_function_of_the_seed() -> None:
    features_nF = np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)
    first, again, other = (feature_partitions(features_nF, settings(), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_too_few_images_are_one_line() -> None:
    features_nF, _ = separated()
    with pytest.raises(DataError, match=r"method.clusters is 101 .* only 100 training images; lower"):
        feature_partitions(features_nF, settings(clusters=101), seed=0)
    with pytest.raises(DataError, match="a task has 104 images"):
        feature_partitions(features_nF, settings(query=51), seed=0)


def worker(rank: int, folder: str) -> None:
    """Each rank has other features, so that a partition shows which rank computed it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        partitions = feature_partitions(separated(rank)[0], settings(), seed=0)
        torch.save(torch.as_tensor(partitions), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_take_turns_and_all_have_the_same_partitions(tmp_path: Path) -> None:
    alone = [feature_partitions(separated(rank)[0], settings(), seed=0) for rank in range(2)]
    expected = np.stack([alone[0][0], alone[1][1], alone[0][2]])
    assert not np.array_equal(alone[0][1], alone[1][1])
    for found in run_on_two_ranks(worker, tmp_path):
        assert np.array_equal(found, expected)  # type: ignore[arg-type]


def test_more_clusters_than_int16_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 2**15 + 5
    monkeypatch.setattr(cactus, "k_means", lambda features_nF, *_, **__: (np.arange(len(features_nF)), None))
    labels_Pn = feature_partitions(np.zeros((n, 1), dtype=np.float32), settings(clusters=n, partitions=1), seed=0)
    assert np.array_equal(labels_Pn[0], np.arange(n))


def run(folder: Path, killed_at: int | None = None) -> TrainState:
    """Train ProtoNets on clusters, 4 steps of pre-training and 9 of meta-training, with a checkpoint every 4 steps."""
    options = small_tasks.settings({"name": "protonets", "tasks": "clusters"}, pretrain={"steps": 4})
    folder.mkdir(exist_ok=True)
    return train(options, small_tasks.images(), small_tasks.SHAPE, "data", FolderContext(folder, killed_at))


def test_a_resumed_run_has_the_partitions_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed once: another machine could find others. An older checkpoint has none, and finds the same."""
    whole = run(tmp_path / "whole")
    assert whole["remembered"]["partitions"].shape == (2, 50)
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", killed_at=4 + 7)
    path = tmp_path / "parts" / "checkpoint.pt"
    saved = load_state(path)
    assert (saved["stage"], saved["step"]) == ("meta", 4)
    older = {key: value for key, value in saved.items() if key != "remembered"}
    other = saved | {"remembered": {"partitions": saved["remembered"]["partitions"][:, :40].clone()}}
    assert_equal(whole, run(tmp_path / "parts"))

    save_state(path, older)
    assert_equal(whole, run(tmp_path / "parts"))
    save_state(path, saved)
    monkeypatch.setattr(cactus, "k_means", None)
    assert_equal(whole, run(tmp_path / "parts"))
    save_state(path, other)
    with pytest.raises(DataError, match=r"its partitions have the shape \(2, 40\) instead of \(2, 50\); restore"):
        run(tmp_path / "parts")
