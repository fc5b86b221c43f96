"""The speed of a training on this machine, measured on a few steps that are thrown away."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.baseline_tuning import SplitFeatures, evaluate_baselines
from metagmvae.infra.runs.training_inputs import load_inputs, select_device
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train

MEASURED_STEPS = (10, 6)
"""Steps of each stage that are timed. The first ones are slower: the median of the later half counts."""
MOST_META_S = 10.0
"""Slow steps of meta-training are timed for this long only, at least one of them."""
MEASURED_IMAGES = 512
"""Images that the measurement trains on."""
FEATURES = 256
"""Feature size of the random features."""
PROBED_EPISODES = 3
"""Episodes on which the speed of the baselines is measured."""


@dataclass(frozen=True)
class Speed:
    """Measured seconds."""

    device: str
    pretrain_step_s: float
    meta_step_s: float
    encode_s: float
    """Per image, all crops included."""


class _EnoughSteps(Exception):
    """Ends the measurement of slow steps."""


@dataclass
class _Stopwatch(RunContext):
    """A run context that saves nothing and notes the time of each step."""

    device: torch.device
    rank: int = 0
    world: int = 1
    times: dict[str, list[float]] = field(default_factory=lambda: {"pretrain": [], "meta": []})

    def load(self) -> TrainState | None:
        """Nothing is resumed."""
        return None

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        """Note the time.

        Raises:
            _EnoughSteps: the steps of meta-training are slow.
        """
        if line is not None:
            self.times[str(line["stage"])].append(time.perf_counter())
        meta = self.times["meta"]
        if len(meta) > 1 and meta[-1] - meta[0] > MOST_META_S:
            raise _EnoughSteps


def measure_speed(settings: Settings, dataset: Dataset) -> Speed:
    """Train a few steps of the stages on some training rows, and throw the result away.

    A stage that the settings do not have takes 0 seconds.

    Raises:
        SettingsError: the settings name another encoder than that of a dataset of features.
        DataError: the dataset has no training split, or its encoder is missing.
    """
    inputs = load_inputs(settings, dataset)
    settings, split = inputs.settings, inputs.settings.data.train_split
    task = settings.method.shot + settings.method.query
    rows = dataset.rows(split)
    count = min(len(rows), max(MEASURED_IMAGES, settings.pretrain.batch, settings.method.way * task))
    few = _few_steps(settings)
    watch = _Stopwatch(select_device(settings))
    if watch.device.type == "cpu":
        keep_freed_memory()
    with suppress(_EnoughSteps):
        train(
            few,
            np.asarray(rows[np.arange(count)]),
            inputs.image_shape,
            dataset.fingerprint,
            watch,
            encoder=inputs.encoder.model.encoder.state_dict() if inputs.encoder else None,
            labels=np.arange(count) % max(1, count // task),
        )
    pretrain, meta = watch.times["pretrain"], watch.times["meta"]
    meta_step_s = _step_s(meta)
    # Between the stages the images are encoded and the model is initialised from their statistics.
    encode_s = max(meta[0] - pretrain[-1] - meta_step_s, 0.0) / count if meta and pretrain else 0.0
    return Speed(str(watch.device), _step_s(pretrain), meta_step_s, encode_s)


def _few_steps(settings: Settings) -> Settings:
    """The same training with a few steps of each stage.

    Labels take the place of clusters: a step is as fast with them, and nothing has to be clustered before it.
    """
    pretrain, meta = MEASURED_STEPS
    changes = {"steps": min(settings.train.steps, meta), "log_every": 1, "checkpoint_every": pretrain + meta}
    tasks = "labels" if settings.method.tasks == "clusters" else settings.method.tasks
    return settings.model_copy(
        update={
            "method": settings.method.model_copy(update={"tasks": tasks}),
            "pretrain": settings.pretrain.model_copy(update={"steps": min(settings.pretrain.steps, pretrain)}),
            "train": settings.train.model_copy(update=changes),
        }
    )


def _step_s(times: list[float]) -> float:
    """The median time between two steps in the later half."""
    between = np.diff(times[max(len(times) - 1, 0) // 2 :])
    return float(statistics.median(between)) if len(between) else 0.0


def measure_episode_s(way: int, shot: int, query: int) -> float:
    """Return the seconds that the baselines take for an episode, the choice of their settings included.

    Measured on random features, which are as slow as those of a model.
    """
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(way).repeat(shot + query)
    h_nF = torch.randn(len(labels), FEATURES, generator=generator)
    by_kind = {"scaled": h_nF, "unscaled": h_nF}
    evaluated, validation = (SplitFeatures(split, labels, by_kind) for split in ("test", "validation"))
    task = {"way": way, "shot": shot, "query": query, "episodes": PROBED_EPISODES, "seed": 0}
    begin = time.perf_counter()
    evaluate_baselines(evaluated, validation, task)
    return (time.perf_counter() - begin) / PROBED_EPISODES
