"""How long `metagmvae fit` trains: the speed of a few steps is measured, and the steps are set to fit a budget."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict

from metagmvae.configs.load import load_settings
from metagmvae.configs.schema import Average, Settings
from metagmvae.evaluation.fewshot.baseline_tuning import TUNING_EPISODES
from metagmvae.infra.runs.training_speed import Speed, measure_episode_s, measure_speed
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset

MOST_STEPS = {"strokes-cpu": 2000, "photos-cpu": 6400, "photos-gpu": 20_000}
"""Contrastive pre-training is not longer than in the recorded runs of these settings."""
LEAST_STEPS = 20
"""No stage is shorter, even if the budget is too small."""
META_SHARE, ENCODE_SHARE, TASK_SHARE = 0.2, 0.2, 0.15
"""Largest fractions of the budget for meta-training, for encoding, and for the evaluation of one number of shots."""
SAFETY = 0.85
"""Fraction of the remaining time that is planned for: a machine is not equally fast all the time."""
CALIBRATION_S = 15.0
"""Fitting the temperatures after the training; measured on two CPU cores."""
STARTUP_S = 8.0
"""Time of a command beside its work: loading, reading, drawing."""
LEAST_EPISODES, MOST_EPISODES = 100, 600
MOST_CHECKPOINT_S = 60.0
"""Time between two checkpoints."""
VIEWS: Mapping[Average, int] = {"crops": 12, "affine": 5, "mirror": 2, "none": 1}
"""Views of an image that are encoded, by `model.average`."""


class FitSchedule(BaseModel):
    """Measured speed and the steps that follow from it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    device: str
    threads: int
    pretrain_step_s: float
    """Seconds of a step of contrastive pre-training."""
    meta_step_s: float
    encode_s: float
    """Seconds to encode an image, all its views included."""
    used_s: float
    """Seconds of the budget that had been used when the steps were set."""
    reserved_s: float
    """Seconds for everything after the pre-training."""
    pretrain_steps: int
    pretrain_batch: int
    meta_steps: int
    set_size: int
    components: int
    average: Average
    """Views over which features are averaged: fewer than in the preset if encoding them would take too long."""
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
            f"model.average={self.average}",
            f"pretrain.steps={self.pretrain_steps}",
            f"pretrain.batch={self.pretrain_batch}",
            f"train.steps={self.meta_steps}",
            f"train.set_size={self.set_size}",
            f"train.components={self.components}",
            f"train.checkpoint_every={self.checkpoint_every}",
        ]


def make_schedule(
    preset: str,
    dataset: Dataset,
    budget_s: float,
    started: float,
    seed: int,
    shots: Sequence[int],
    compared_s: float = 0.0,
) -> FitSchedule:
    """Measure the speed of a few steps on some training images, and set the numbers of steps.

    Args:
        preset: name of the preset.
        dataset: prepared images.
        budget_s: seconds for everything.
        started: `time.monotonic` when the command began.
        seed: of the training.
        shots: numbers of shots of the evaluation.
        compared_s: seconds that a comparison with another encoder will take.

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
    # Training images for the statistics; held-out ones for validation, calibration and each evaluation.
    encoded = samples["train"] + (2 + len(shots)) * (samples.get("validation", 0) + samples.get("test", 0))
    average, encode_s = affordable_average(settings, speed, ENCODE_SHARE * budget_s / encoded)
    evaluation_s = min(TASK_SHARE * budget_s, STARTUP_S + measure_episode_s(5, 5, 15) * TUNING_EPISODES)
    reserved = meta_steps * speed.meta_step_s + encode_s * encoded + len(shots) * evaluation_s
    reserved += CALIBRATION_S + 2 * STARTUP_S + compared_s
    used = time.monotonic() - started
    planned = int(SAFETY * (budget_s - used - reserved) / speed.pretrain_step_s)
    return FitSchedule(
        device=speed.device,
        threads=torch.get_num_threads(),
        pretrain_step_s=speed.pretrain_step_s,
        meta_step_s=speed.meta_step_s,
        encode_s=encode_s,
        used_s=used,
        reserved_s=reserved,
        pretrain_steps=min(MOST_STEPS[preset], max(LEAST_STEPS, planned)),
        pretrain_batch=batch,
        meta_steps=meta_steps,
        set_size=set_size,
        components=components,
        average=average,
        checkpoint_every=max(1, min(500, int(MOST_CHECKPOINT_S / speed.pretrain_step_s))),
        episodes=episodes,
        fits=planned >= LEAST_STEPS,
    )


def affordable_average(settings: Settings, speed: Speed, image_s: float) -> tuple[Average, float]:
    """Return the views of `model.average` that can be encoded in some seconds per image, and the seconds they take."""
    most = VIEWS[settings.model.average]
    # Averages with fewer views; those of `affine` are for strokes, and the mirror image for photographs.
    skipped: Average = "mirror" if settings.model.average == "affine" else "affine"
    fewer = {average: views for average, views in VIEWS.items() if views <= most and average != skipped}
    choices = [(average, speed.encode_s * views / most) for average, views in fewer.items()]
    return next(((average, seconds) for average, seconds in choices if seconds <= image_s), choices[-1])


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
