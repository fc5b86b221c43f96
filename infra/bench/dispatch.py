"""The table of benchmarks that `metagmvae bench NAME` runs. Heavy modules are imported when a benchmark starts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metagmvae.pipelines.optional_packages import optional_package
from metagmvae.pipelines.records import DataError

if TYPE_CHECKING:
    from metagmvae.pipelines.shards.dataset import Dataset

TUNE_TRIALS = 200


def _step(request: Namespace) -> dict[str, Any]:
    import torch

    from metagmvae.evaluation.bench.step_speed import bench_step

    return bench_step(request.repeats, torch.get_num_threads())


def _loader(request: Namespace) -> dict[str, Any]:
    from importlib.util import find_spec

    from metagmvae.evaluation.bench.loader_speed import BATCH, LOADER_WORKERS, SET_SIZE, bench_loader
    from metagmvae.pipelines.shards.image_codec import worth_encoding

    dataset, header = _open_data(request)
    size = (dataset, request.split, request.pictures, request.repeats)
    if not (worth_encoding(dataset.image_shape) and find_spec("ray")):
        return header | bench_loader(*size)
    from metagmvae.infra.bench.ray_reading import ray_reader

    with ray_reader(LOADER_WORKERS, BATCH * SET_SIZE) as read:
        return header | bench_loader(*size, read)


def _episodes(request: Namespace) -> dict[str, Any]:
    import torch

    from metagmvae.configs.schema import AdaptSettings, ModelSettings
    from metagmvae.evaluation.bench.episode_speed import bench_episodes
    from metagmvae.training.device.default import default_device
    from metagmvae.training.methods.meta_gmvae import MetaGMVAE
    from metagmvae.training.trainer.builders import build_model

    dataset, header = _open_data(request)
    # Speed does not depend on the values of the weights, so the paper's model is used as initialised.
    model = build_model(ModelSettings(), dataset.image_shape, 0).to(default_device())
    assert isinstance(model, MetaGMVAE)
    model = model.to(memory_format=torch.channels_last)
    images, labels = dataset.images(request.split), dataset.labels(request.split)
    literal = max(2, min(request.literal_episodes, request.episodes))
    return header | bench_episodes(
        model, AdaptSettings(), images, labels, episodes=request.episodes, literal_episodes=literal
    )


def _simclr(request: Namespace) -> dict[str, Any]:
    from metagmvae.evaluation.bench.simclr_speed import bench_simclr

    dataset, header = _open_data(request)
    return header | bench_simclr(dataset, request.split, request.repeats)


def _features(request: Namespace) -> dict[str, Any]:
    from metagmvae.evaluation.bench.feature_speed import bench_features

    return bench_features(request.rows)


def _prepare(request: Namespace) -> dict[str, Any]:
    from metagmvae.evaluation.bench.prepare_speed import bench_prepare

    if not request.source:
        raise DataError("bench prepare reads raw images: name them with --source (and --from for another kind)")
    with optional_package("ray", "metagmvae bench prepare"):
        from metagmvae.infra.cluster.tasks import ray_map
    return bench_prepare(request.kind, request.source, request.workers, ray_map)


def _tune(request: Namespace) -> dict[str, Any]:
    with optional_package("ray.tune", "metagmvae bench tune"):
        from metagmvae.infra.bench.sweep_speed import bench_sweep
    return bench_sweep(request.trials or TUNE_TRIALS)


def _open_data(request: Namespace) -> tuple[Dataset, dict[str, Any]]:
    """Open the data set of `--data`; also return the keys that name it in the result."""
    from metagmvae.pipelines.shards.dataset import Dataset

    if not request.data:
        raise DataError(f"bench {request.name} reads a data set: name it with --data")
    dataset = Dataset.open(request.data)
    dataset.split(request.split)  # raises if the data set has no such split
    return dataset, {"data": str(request.data), "data_fingerprint": dataset.fingerprint, "split": request.split}


BENCHES: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "step": _step,
    "loader": _loader,
    "episodes": _episodes,
    "simclr": _simclr,
    "features": _features,
    "prepare": _prepare,
    "tune": _tune,
}
"""Benchmarks by the name that the command line takes. Each takes the options of `metagmvae bench --help`."""
