"""Images of five classes, settings and runs of methods that learn from tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from small_runs import FolderContext

from metagmvae.configs.schema import Settings
from metagmvae.training.methods.methods_by_name import find_method
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.trainer.builders import build_encoder_model
from metagmvae.training.trainer.context import TrainState
from metagmvae.training.trainer.stages import train

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


PROTONETS = {"name": "protonets"}
RUNS: dict[str, Settings] = {
    "labels": settings(PROTONETS | {"tasks": "labels"}),
    "images": settings(PROTONETS | {"tasks": "images", "shot": 1}),
    "clusters": settings(PROTONETS | {"tasks": "clusters"}, pretrain={"steps": 4}),
    "features": settings(PROTONETS | {"tasks": "labels", "network": "mlp"}, pretrain={"steps": 4}),
    "features and clusters": settings(PROTONETS | {"tasks": "clusters", "network": "mlp"}, pretrain={"steps": 4}),
    "views of features": settings(PROTONETS | {"tasks": "images", "network": "mlp", "shot": 1}, pretrain={"steps": 4}),
    "dataset of features": settings(PROTONETS | {"tasks": "clusters", "network": "mlp"}),
}
"""Each kind of tasks and of networks; those with pre-training need it."""


def validate(model: Any) -> dict[str, dict[str, float]]:
    """A number that depends on all weights."""
    assert not model.training
    total = sum(p.detach().double().abs().sum() for p in model.parameters())
    return {"3w2s": {"accuracy": float(total) % 1.0, "ci95": 0.1}}


def run(options: Settings, context: FolderContext, stored: bool = False) -> TrainState:
    """Train; with `stored` on the features of an encoder, as of a dataset of features."""
    method, data, encoder = find_method(options.method), images(), None
    if stored:
        model = build_encoder_model(options.model, SHAPE, seed=7)
        encoder = model.encoder.state_dict()
        data = encode_images(model, data, torch.device("cpu"), raw=True).numpy()
    labels = LABELS if method.needs_labels(options) else None
    return train(options, data, SHAPE, "data", context, validate, labels=labels, encoder=encoder)
