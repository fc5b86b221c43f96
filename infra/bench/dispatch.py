"""The benchmarks by name, with what each needs of the request."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset

TUNE_TRIALS = 200
SIMULATED_TRIALS = 10_000


def run_bench(request: Namespace) -> dict[str, Any]:
    """Run `request.name`; see `metagmvae bench --help` for the rest of the request.

    Raises:
        DataError: the benchmark needs a data set and none was given.
    """
    if request.name == "step":
        from metagmvae.evaluation.bench.step_speed import bench_step

        return bench_step(request.repeats, torch.get_num_threads())
    if request.name == "tune":
        from metagmvae.infra.bench.sweep_speed import bench_sweep

        return bench_sweep(request.trials or TUNE_TRIALS)
    if request.name == "features":
        from metagmvae.evaluation.bench.feature_speed import bench_features

        return bench_features(request.rows)
    if request.name == "prepare":
        from metagmvae.evaluation.bench.prepare_speed import bench_prepare
        from metagmvae.infra.cluster.tasks import ray_map

        if not request.source:
            raise DataError("bench prepare reads raw images: name them with --source (and --from for another kind)")
        return bench_prepare(request.kind, request.source, request.workers, ray_map)
    if request.name == "sweep-scale":
        from metagmvae.infra.bench.sweep_scale import bench_sweep_scale

        trials = request.trials or SIMULATED_TRIALS
        counts = [count for count in (100, 1000, 10_000) if count < trials]
        return bench_sweep_scale([*counts, trials], request.runs, request.stores, request.writers)
    return _on_data(request)


def _on_data(request: Namespace) -> dict[str, Any]:
    """The benchmarks of a data set."""
    if not request.data:
        raise DataError(f"bench {request.name} reads a data set: name it with --data")
    dataset = Dataset.open(request.data)
    dataset.split(request.split)
    about = {"data": str(request.data), "data_fingerprint": dataset.fingerprint, "split": request.split}
    if request.name == "loader":
        from metagmvae.evaluation.bench.loader_speed import bench_loader

        return about | bench_loader(dataset, request.split, request.pictures, request.repeats)
    if request.name == "simclr":
        from metagmvae.evaluation.bench.simclr_speed import bench_simclr

        return about | bench_simclr(dataset, request.split, request.repeats)
    from metagmvae.configs.schema import AdaptSettings, ModelSettings
    from metagmvae.evaluation.bench.episode_speed import bench_episodes
    from metagmvae.training.trainer.builders import build_model

    # Time does not depend on what was learned: the model of the paper as it was initialised will do.
    model = build_model(ModelSettings(), dataset.image_shape, 0).to(memory_format=torch.channels_last)
    images, labels = dataset.images(request.split), dataset.labels(request.split)
    episodes, literal = request.episodes, min(request.literal_episodes, request.episodes)
    return about | bench_episodes(
        model, AdaptSettings(), images, labels, episodes=episodes, literal_episodes=max(2, literal)
    )
