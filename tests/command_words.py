"""Words of command lines in tests: settings of a small training, and settings as `--set` options."""

from __future__ import annotations

from collections.abc import Mapping

TINY = {
    "model.channels": 8,
    "model.width": 32,
    "model.latent": 8,
    "pretrain.steps": 4,
    "pretrain.batch": 16,
    "train.steps": 4,
    "train.set_size": 24,
    "train.samples": 4,
    "train.decode_samples": 2,
    "train.checkpoint_every": 2,
    "train.log_every": 2,
    "train.precision": "float32",
    "validation.every": 4,
    "validation.episodes": 5,
    "validation.calibration_episodes": 2,
    "adapt.samples": 4,
    "tracking.enabled": "false",
}
"""Settings of a training that takes about a second."""


def pairs(settings: Mapping[str, object]) -> list[str]:
    """Settings as `key=value`, as `load_settings` takes them."""
    return [f"{key}={value}" for key, value in settings.items()]


def set_words(settings: Mapping[str, object]) -> list[str]:
    """Settings as `--set key=value`, word by word."""
    return [word for pair in pairs(settings) for word in ("--set", pair)]
