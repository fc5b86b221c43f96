"""Complete small runs of pre-training and meta-training, with checkpoints in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import Settings
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.trainer.checkpoint import load_state, save_state
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train

SHAPE = (1, 8, 8)


def settings(reconstruct: str = "pixels", **changes: dict[str, Any]) -> Settings:
    """Settings of a short run, with changes by section."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "reconstruct": reconstruct,
            "latent": 2,
            "channels": 4,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
        "pretrain": {"steps": 6, "batch": 8},
        "train": {
            "steps": 9,
            "batch": 2,
            "set_size": 6,
            "samples": 3,
            "decode_samples": 2,
            "components": 2,
            "em_iterations": 2,
            "learning_rate": 0.01,
            "start": "components" if reconstruct == "features" else "random",
            "schedule": "cosine",
            "clip_norm": 5.0,
            "log_every": 2,
            "checkpoint_every": 4,
        },
        "validation": {"every": 3},
        "data": {},
    }
    return Settings.model_validate({name: part | changes.get(name, {}) for name, part in sections.items()})


def images() -> np.ndarray:
    """Black and white images, uint8 (40, 1, 8, 8)."""
    rng = np.random.default_rng(0)
    return (rng.random((40, *SHAPE)) < 0.3).astype(np.uint8) * 255


def validate(model: MetaGMVAE) -> dict[str, dict[str, float]]:
    """A number that depends on all weights, as a NumPy type, which a validation may return."""
    assert not model.training
    total = sum(p.detach().double().abs().sum() for p in model.parameters())
    return {"5w1s": {"accuracy": np.float64(float(total) % 1.0), "ci95": np.float64(0.1)}}


class FolderContext(RunContext):
    """A context with checkpoints in a folder. It is killed before it records the line of global step `killed_at`."""

    device = torch.device("cpu")
    rank, world = 0, 1

    def __init__(self, folder: Path, killed_at: int = 0, signal_number: int = 0) -> None:
        self.path = folder / "checkpoint.pt"
        self.killed_at, self.signal_number = killed_at, signal_number
        self.lines: list[MetricLine] = []
        self.saved: list[tuple[str, int]] = []

    def load(self) -> TrainState | None:
        return load_state(self.path) if self.path.exists() else None

    def report(self, line: MetricLine | None, state: TrainState | None) -> None:
        if line is not None and self.killed_at and int(line["global_step"]) >= self.killed_at:
            if self.signal_number:
                os.kill(os.getpid(), self.signal_number)
            raise InterruptedError
        if line is not None:
            self.lines.append(line)
        if state is not None:
            self.saved.append((state["stage"], state["step"]))
            save_state(self.path, state)


def run(context: FolderContext, options: Settings) -> TrainState:
    """Train on `images`."""
    return train(options, images(), SHAPE, "fingerprint", context, validate)


def without_times(lines: list[MetricLine]) -> list[dict[str, Any]]:
    """The metric lines without what differs between equal runs."""
    times = {"images_per_s", "elapsed_s", "waiting_share"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def flat(value: Any) -> list[Any]:
    """A state as a list of plain values, which can be compared."""
    if isinstance(value, dict):
        return [item for key in sorted(value, key=str) for item in (key, *flat(value[key]))]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flat(part)]
    return [value.tolist()] if isinstance(value, torch.Tensor) else [value]


def assert_equal(left: TrainState | None, right: TrainState | None) -> None:
    """Check that two states are equal, bit for bit, but for times."""
    assert left is not None
    assert right is not None
    for part in (left.keys() | right.keys()) - {"elapsed", "version"}:
        assert flat(left[part]) == flat(right[part]), part


UNINTERRUPTED: dict[str, FolderContext] = {}


def uninterrupted(reconstruct: str, tmp_path_factory: pytest.TempPathFactory) -> FolderContext:
    """A complete run, the same for all tests of the process."""
    if reconstruct not in UNINTERRUPTED:
        UNINTERRUPTED[reconstruct] = FolderContext(tmp_path_factory.mktemp("uninterrupted"))
        torch.manual_seed(1)
        run(UNINTERRUPTED[reconstruct], settings(reconstruct))
    return UNINTERRUPTED[reconstruct]
