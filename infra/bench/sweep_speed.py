"""Runs the sweeps that `metagmvae bench tune` times: short trials on generated glyphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metagmvae.configs.load import load_settings
from metagmvae.configs.search_space import load_space
from metagmvae.evaluation.bench.sweep_cost import bench_tune
from metagmvae.evaluation.sweeps.trials import TRIALS, Trial, read_trials
from metagmvae.infra.tune.ray_backend import sweep_cluster
from metagmvae.infra.tune.request import SweepRequest, run
from metagmvae.pipelines.shards.writer import write_dataset
from metagmvae.pipelines.sources.source import open_source

SHORT = {
    "model.channels": 8,
    "model.width": 32,
    "model.latent": 8,
    "adapt.samples": 4,
    "train.steps": 20,
    "train.batch": 2,
    "train.samples": 4,
    "train.checkpoint_every": 10,
    "train.precision": "float32",
    "validation.every": 10,
    "validation.episodes": 20,
}
PRESET = "omniglot-5way-published-code"
SPACE = """
train.set_size = { range = [20, 40] }
train.em_iterations = { choice = [1, 2, 3] }
train.learning_rate = { loguniform = [1e-4, 1e-2] }
"""


def bench_sweep(trials: int) -> dict[str, Any]:
    """Time sweeps of short trials on one Ray cluster, with as many simultaneous trials as CPUs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(open_source("glyphs", classes=(40, 10, 5), drawings=20), folder / "data")
        (folder / "space.toml").write_text(SPACE)
        pairs = SHORT | {"data.uri": folder / "data", "tracking.store": folder / "mlflow"}
        settings = [f"{key}={value}" for key, value in pairs.items()]

        def sweep(count: int, tracked: bool, ended: Callable[[], None]) -> Sequence[Trial]:
            base = load_settings(PRESET, [*settings, f"tracking.enabled={str(tracked).lower()}"])
            out = folder / f"sweep-{count}-{tracked}"
            request = SweepRequest(base, load_space(folder / "space.toml"), out, search="tpe", trials=count)
            run(request, lambda done, total: ended())
            return read_trials(out / TRIALS)

        with sweep_cluster(load_settings(PRESET, settings), 0):
            return bench_tune(sweep, trials) | {"short": SHORT}
