"""Both stages of a training draw from all rows of the training data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metagmvae.configs.schema import Settings
from metagmvae.training.augment.build_view import build_view
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.frozen_features import ScaledRows
from metagmvae.training.models.feature_scaling import ViewWhitening
from metagmvae.training.trainer import stages
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.context import MetricLine, RunContext, TrainState
from metagmvae.training.trainer.stages import train

COUNT, SHAPE = 40, (1, 8, 8)


class Context(RunContext):
    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.stage = ""

    def load(self) -> TrainState | None:
        return None

    def report(self, line: MetricLine, state: TrainState | None) -> None:
        pass


class RecordedRows:
    """Images by row index; remembers which rows were read."""

    shape = (COUNT, *SHAPE)

    def __init__(self) -> None:
        self.read: list[int] = []
        self.images = np.random.default_rng(0).integers(0, 256, self.shape, dtype=np.uint8)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.read += np.asarray(rows).tolist()
        return self.images[rows]


def settings(pretrain: int, meta: int, reconstruct: str = "pixels", features: str = "standard") -> Settings:
    model = {"reconstruct": reconstruct, "features": features, "channels": 4, "width": 8, "heads": 2, "latent": 3}
    stage = {"steps": meta, "batch": 2, "set_size": 20, "samples": 2, "components": 2, "em_iterations": 2}
    pretraining = {"steps": pretrain, "batch": 8}
    return Settings.model_validate({"model": model, "train": stage, "pretrain": pretraining})


@pytest.mark.parametrize(("pretrain", "meta"), [(10, 0), (0, 10)])
def test_every_image_is_drawn_in_either_stage(pretrain: int, meta: int) -> None:
    """Two epochs of pre-training; in meta-training 400 draws with replacement, which miss an image with p < 0.002."""
    data = RecordedRows()
    train(settings(pretrain, meta), data, SHAPE, "data", Context())
    assert sorted(set(data.read)) == list(range(COUNT))


def test_every_feature_is_scaled_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    read_scaled = ScaledRows.__getitem__

    def spy(self: ScaledRows, rows: np.ndarray) -> np.ndarray:
        drawn.extend(np.asarray(rows).tolist())
        return read_scaled(self, rows)

    fitted: list[int] = []
    monkeypatch.setattr(ScaledRows, "__getitem__", spy)
    monkeypatch.setattr(stages, "fit_feature_scaling", lambda model, raw, views: fitted.append(len(raw)))
    train(settings(2, 10, "features"), RecordedRows(), SHAPE, "data", Context())
    assert fitted == [COUNT]
    assert sorted(set(drawn)) == list(range(COUNT))


@pytest.mark.parametrize("reader", ["auto", "device"])
def test_view_whitening_of_a_run_is_that_of_its_encoder_and_views(reader: str) -> None:
    """The scaling in the checkpoint, computed again from the trained encoder and the keyed views."""
    chosen = settings(2, 2, "features", "view-whitened")
    changes: dict[str, Any] = {"data": chosen.data.model_copy(update={"reader": reader})}
    # Without the last ReLU, after which these few features can all be 0.
    changes["model"] = chosen.model.model_copy(update={"rectified": False})
    chosen = chosen.model_copy(update=changes)
    state = train(chosen, RecordedRows(), SHAPE, "data", Context())
    model = build_model(chosen.model, SHAPE, 0)
    model.load_state_dict(state["model"])
    images = torch.from_numpy(RecordedRows().images).float() / 255
    view = build_view(chosen.pretrain, model)
    with torch.no_grad():
        encoder = model.encoder.eval()
        views = view(images, keyed_generator(torch.device("cpu"), chosen.train.seed, "scaling"))
        unit, unit_views = (F.normalize(encoder(x).double(), dim=1) for x in (images, views))
    difference = unit_views - unit
    assert difference.square().mean() > 1e-4
    expected = ViewWhitening(model.feature_dim)
    expected.set_statistics(unit.mean(dim=0), difference.T @ difference / (2 * COUNT))
    assert torch.allclose(state["model"]["scale.mean"], expected.mean, atol=1e-6)
    assert torch.allclose(state["model"]["scale.whitening"], expected.whitening, rtol=1e-3, atol=1e-3)
