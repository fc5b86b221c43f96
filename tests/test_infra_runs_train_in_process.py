"""Which split a training reads and which one its validation reads, with every reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import Settings
from metagmvae.infra.runs import train_in_process as module
from metagmvae.infra.runs.training_inputs import load_inputs
from metagmvae.pipelines.sampling.sequential import StreamedImages
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel
from metagmvae.training.trainer.builders import build_model

CPU = torch.device("cpu")
MODEL = {"channels": 4, "width": 8, "heads": 2, "latent": 3}


class Context:
    rank, world, device = 0, 1, CPU


def arguments_of_train(settings: Settings, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The positional arguments that `train_in_process` passes to `train`."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "train", lambda *args, **_: calls.append(args))
    module.train_in_process(load_inputs(settings, dataset), Context(), "learner")  # type: ignore[arg-type]
    (call,) = calls
    return call


@pytest.mark.parametrize("reader", ["auto", "memory", "mmap", "device", "stream"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_training_reads_all_images_of_its_split_and_no_others(
    reader: str, split: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"uri": dataset.uri, "reader": reader, "train_split": split}
    settings = Settings.model_validate({"data": data, "model": MODEL})
    rows = arguments_of_train(settings, dataset, monkeypatch)[1]
    expected = dataset.images(split)
    assert len(rows) == len(expected)
    if isinstance(rows, StreamedImages):
        assert rows.split == split
        return
    everything = np.arange(len(expected))
    assert np.array_equal(rows[everything], expected[everything])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_validation_reads_its_own_split(split: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"data": {"uri": dataset.uri, "validation_split": split}, "model": MODEL})
    validator = arguments_of_train(settings, dataset, monkeypatch)[5]
    received: list[tuple[torch.Tensor, np.ndarray]] = []

    def validate(
        model: EncoderModel, settings: Settings, h_nF: torch.Tensor, labels: np.ndarray
    ) -> Mapping[str, Mapping[str, float]]:
        received.append((h_nF, labels))
        return {}

    monkeypatch.setattr(module, "validate", validate)
    model = build_model(settings.model, (1, 28, 28), 0).eval()
    validator(model)
    (h_nF, labels), *_ = received
    assert np.array_equal(labels, dataset.labels(split))
    assert torch.allclose(h_nF, encode_images(model, dataset.images(split), CPU), atol=1e-5)
