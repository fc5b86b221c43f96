"""How long `metagmvae fit` trains: the speed of a few steps is measured, and the steps are set to fit a budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from metagmvae.configs.load import load_settings
from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot.baseline_tuning import TUNING_EPISODES, SplitFeatures, evaluate_baselines
from metagmvae.infra.runs.training_inputs import select_device
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.device.allocator import keep_freed_memory
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train

MOST_STEPS = {"strokes-cpu": 2000, "photos-cpu": 6400, "photos-gpu": 20_000}
"""Contrastive pre-training is not longer than in the recorded runs of these settings."""
LEAST_STEPS = 20
"""No stage is shorter, even if the budget is too small."""
META_SHARE = 0.2
"""Largest fraction of the budget for meta-training."""
MEASURED_STEPS = (10, 6)
"""Steps of each stage that are timed. The first ones are slower: the median of the later half counts."""
MEASURED_IMAGES = 512
"""Images that the measurement trains on."""
SAFETY = 0.85
"""Fraction of the remaining time that is planned for: a machine is not equally fast all the time."""
TASK_SHARE = 0.15
"""Largest fraction of the budget that the evaluation of one number of shots is planned with."""
FEATURES = 256
"""Feature size of the random features."""
PROBED_EPISODES = 3
"""Episodes on which the speed of the baselines is measured."""
CALIBRATION_S = 15.0
"""Fitting the temperatures after the training; measured on two CPU cores."""
STARTUP_S = 8.0
"""Time of a command beside its work: loading, reading, drawing."""
LEAST_EPISODES, MOST_EPISODES = 100, 600
MOST_CHECKPOINT_S = 60.0
"""Time between two checkpoints."""


class FitSchedule(BaseModel):
    """Measured speed and the steps that follow from it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    device: str
    threads: int
    pretrain_step_s: float
    """Seconds of a step of contrastive pre-training."""
    meta_step_s: float
    encode_s: float
    """Seconds to encode an image, all crops included."""
    used_s: float
    """Seconds of the budget that had been used when the steps were set."""
    reserved_s: float
    """Seconds for everything after the pre-training."""
    pretrain_steps: int
    pretrain_batch: int
    meta_steps: int
    set_size: int
    components: int
    checkpoint_every: int
    episodes: int
    """Most test episodes for each number of shots."""
    fits: bool
    """Whether the least number of steps fits the budget."""

    def affordable_episodes(self, left_s: float, episode_s: float) -> int:
        """Return the test episodes of a task that fit into some seconds, at least `LEAST_EPISODES`.

        Args:
            left_s: seconds that are left for the task.
            episode_s: seconds of an episode (`measure_episode_s`).
        """
        possible = (left_s - STARTUP_S) / episode_s
        # The settings of the baselines are chosen on at most 300 episodes; more test episodes take little time.
        return self.episodes if possible >= TUNING_EPISODES else int(min(self.episodes, max(LEAST_EPISODES, possible)))

    @property
    def overrides(self) -> list[str]:
        """The settings for `metagmvae train --set`."""
        return [
            f"pretrain.steps={self.pretrain_steps}",
            f"pretrain.batch={self.pretrain_batch}",
            f"train.steps={self.meta_steps}",
            f"train.set_size={self.set_size}",
            f"train.components={self.components}",
            f"train.checkpoint_every={self.checkpoint_every}",
        ]


def make_schedule(
    preset: str, dataset: Dataset, budget_s: float, started: float, seed: int, shots: Sequence[int]
) -> FitSchedule:
    """Measure the speed of a few steps on some training images, and set the numbers of steps.

    Args:
        preset: name of the preset.
        dataset: prepared images.
        budget_s: seconds for everything.
        started: `time.monotonic` when the command began.
        seed: of the training.
        shots: numbers of shots of the evaluation.

    Raises:
        DataError: the data set has too few images.
    """
    samples = {split: part["samples"] for split, part in dataset.manifest["splits"].items()}
    batch, set_size, components = sizes_for(load_settings(preset), samples["train"])
    changed = [f"pretrain.batch={batch}", f"train.set_size={set_size}", f"train.components={components}"]
    settings = load_settings(preset, [*changed, f"train.seed={seed}"])
    speed = measure_speed(settings, dataset)
    episodes = int(min(MOST_EPISODES, max(LEAST_EPISODES, budget_s * 2 / 3)))
    meta_steps = max(LEAST_STEPS, min(settings.train.steps, int(META_SHARE * budget_s / speed.meta_step_s)))
    held_out = samples.get("validation", 0) + samples.get("test", 0)
    reserved = (
        meta_steps * speed.meta_step_s
        # Training images for the statistics; held-out ones for validation, calibration and each evaluation.
        + speed.encode_s * (samples["train"] + (2 + len(shots)) * held_out)
        + len(shots) * min(TASK_SHARE * budget_s, STARTUP_S + measure_episode_s(5, 5, 15) * TUNING_EPISODES)
        + CALIBRATION_S
        + 2 * STARTUP_S
    )
    used = time.monotonic() - started
    planned = int(SAFETY * (budget_s - used - reserved) / speed.pretrain_step_s)
    steps = min(MOST_STEPS[preset], max(LEAST_STEPS, planned))
    return FitSchedule(
        device=speed.device,
        threads=torch.get_num_threads(),
        pretrain_step_s=speed.pretrain_step_s,
        meta_step_s=speed.meta_step_s,
        encode_s=speed.encode_s,
        used_s=used,
        reserved_s=reserved,
        pretrain_steps=steps,
        pretrain_batch=batch,
        meta_steps=meta_steps,
        set_size=set_size,
        components=components,
        checkpoint_every=max(1, min(500, int(MOST_CHECKPOINT_S / speed.pretrain_step_s))),
        episodes=episodes,
        fits=planned >= LEAST_STEPS,
    )


def sizes_for(settings: Settings, images: int) -> tuple[int, int, int]:
    """Return the batch of the pre-training, the set size and the components: of the settings, or smaller ones.

    A batch has at most half of the images, so that its negatives differ from step to step; a set has at most all
    images, and at least 5 images per component.

    Raises:
        DataError: there are fewer than four images.
    """
    if images < 4:
        raise DataError(f"{images} training images are left; at least 4 are needed")
    set_size = min(settings.train.set_size, images)
    return min(settings.pretrain.batch, images // 2), set_size, max(1, min(settings.train.components, set_size // 5))


@dataclass(frozen=True)
class Speed:
    """Measured seconds."""

    device: str
    pretrain_step_s: float
    meta_step_s: float
    encode_s: float
    """Per image."""


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
        """Note the time."""
        if line is not None:
            self.times[str(line["stage"])].append(time.perf_counter())


def measure_speed(settings: Settings, dataset: Dataset) -> Speed:
    """Train a few steps of both stages on some training images, and throw the result away."""
    count = min(len(dataset.images("train")), max(MEASURED_IMAGES, settings.pretrain.batch))
    images = np.asarray(dataset.images("train")[np.arange(count)])
    pretrain_steps, meta_steps = MEASURED_STEPS
    few = settings.model_copy(
        update={
            "pretrain": settings.pretrain.model_copy(update={"steps": pretrain_steps}),
            "train": settings.train.model_copy(
                update={"steps": meta_steps, "log_every": 1, "checkpoint_every": pretrain_steps + meta_steps}
            ),
        }
    )
    watch = _Stopwatch(select_device(settings))
    if watch.device.type == "cpu":
        keep_freed_memory()
    train(few, images, dataset.image_shape, dataset.fingerprint, watch)
    pretrain, meta = watch.times["pretrain"], watch.times["meta"]
    pretrain_step_s = statistics.median(np.diff(pretrain[pretrain_steps // 2 :]))
    meta_step_s = statistics.median(np.diff(meta[meta_steps // 2 :]))
    # Between the stages the images are encoded and the model is initialised from their statistics.
    encode_s = max(meta[0] - pretrain[-1] - meta_step_s, 0.0) / count
    return Speed(str(watch.device), float(pretrain_step_s), float(meta_step_s), encode_s)


def measure_episode_s(way: int, shot: int, query: int) -> float:
    """Return the seconds that the baselines take for an episode, the choice of their settings included.

    Measured on random features, which are as slow as those of a model.
    """
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(way).repeat(shot + query)
    h_nF = torch.randn(len(labels), FEATURES, generator=generator)
    splits = [SplitFeatures(split, labels, {"scaled": h_nF, "unscaled": h_nF}) for split in ("test", "validation")]
    task = {"way": way, "shot": shot, "query": query, "episodes": PROBED_EPISODES, "seed": 0}
    begin = time.perf_counter()
    evaluate_baselines(*splits, task)
    return (time.perf_counter() - begin) / PROBED_EPISODES
