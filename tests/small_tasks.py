"""Images of five classes, settings and runs of methods that learn from tasks."""

from __future__ import annotations

from typing import Any

import numpy as np

from metagmvae.configs.schema import Settings

SHAPE = (1, 8, 8)
LABELS = np.repeat(np.arange(5), 10)


def settings(method: dict[str, Any], **changes: dict[str, Any]) -> Settings:
    """Settings of a short run of a method, with changes by section."""
    sections: dict[str, dict[str, Any]] = {
        "method": {"way": 3, "shot": 2, "query": 3, "clusters": 4, "partitions": 2, "inner_steps": 2, "test_steps": 3},
        "model": {"channels": 4},
        "pretrain": {"steps": 0, "batch": 8},
        "train": {
            "steps": 9,
            "batch": 2,
            "learning_rate": 0.01,
            "schedule": "cosine",
            "clip_norm": 5.0,
            "log_every": 2,
            "checkpoint_every": 4,
        },
        "validation": {"every": 3},
    }
    sections["method"] |= method
    return Settings.model_validate({name: part | changes.get(name, {}) for name, part in sections.items()})


def images() -> np.ndarray:
    """Black and white images, uint8 (50, 1, 8, 8); those of a class differ in a tenth of the pixels."""
    rng = np.random.default_rng(0)
    classes = rng.random((5, *SHAPE)) < 0.4
    flipped = rng.random((50, *SHAPE)) < 0.1
    return (classes[LABELS] ^ flipped).astype(np.uint8) * 255
