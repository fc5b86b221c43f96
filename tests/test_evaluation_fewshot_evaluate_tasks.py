"""The features on which a model and its baselines are evaluated: scaled by the statistics of the training images."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from metagmvae.configs.schema import Settings
from metagmvae.evaluation.fewshot import baseline_tuning
from metagmvae.evaluation.fewshot import evaluate_tasks as module
from metagmvae.evaluation.fewshot.baselines import BASELINES, soft_k_means
from metagmvae.evaluation.fewshot.encoding import encode_split
from metagmvae.evaluation.fewshot.evaluate_tasks import evaluate_tasks
from metagmvae.pipelines.records import DataError
from metagmvae.pipelines.shards.dataset import Dataset
from metagmvae.training.methods.frozen_features import fit_feature_scaling
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.feature_scaling import FeatureScale, FeatureWhitening
from metagmvae.training.trainer.builders import build_model
from metagmvae.training.trainer.package import LoadedModel

CPU = torch.device("cpu")
TASK = {"way": 3, "shot": 1, "query": 5, "episodes": 30, "seed": 0}
Scaling = Literal["standard", "whitened"]


def loaded_model(dataset: Dataset, scaling: Scaling) -> LoadedModel:
    """An untrained model whose feature scaling has the statistics of the training split."""
    model = {"reconstruct": "features", "features": scaling, "channels": 8, "width": 16, "heads": 2, "latent": 3}
    # Without validation classes the baselines keep their defaults.
    settings = Settings.model_validate(
        {"model": model, "adapt": {"samples": 4}, "data": {"validation_split": "absent"}}
    )
    net = build_model(settings.model, (1, 28, 28), 0).eval()
    fit_feature_scaling(net, raw_features(net, dataset, "train").numpy())
    return LoadedModel(net, settings, (1, 28, 28), {})


def raw_features(net: MetaGMVAE, dataset: Dataset, split: str) -> Tensor:
    return encode_images(net, dataset.images(split), CPU, raw=True)


def scaled_by_training_statistics(net: MetaGMVAE, dataset: Dataset, split: str) -> Tensor:
    """Features of a split, scaled literally, with statistics computed anew from the training split."""
    train, raw = raw_features(net, dataset, "train").double(), raw_features(net, dataset, split).double()
    if isinstance(net.scale, FeatureScale):
        std = train.std(dim=0)
        scaled = (raw - train.mean(dim=0)) / torch.where(std > 0, std, 1.0)
    else:
        assert isinstance(net.scale, FeatureWhitening)
        train, raw = (torch.nn.functional.normalize(h.sign() * h.abs().sqrt(), dim=1) for h in (train, raw))
        expected = FeatureWhitening(raw.shape[1]).double()
        expected.set_statistics(train.mean(dim=0), torch.cov(train.T))
        scaled = (raw - expected.mean) @ expected.whitening
    return torch.nn.functional.normalize(scaled, dim=1) * math.sqrt(raw.shape[1])


@pytest.mark.parametrize("scaling", ["standard", "whitened"])
def test_evaluated_features_keep_the_scale_of_the_training_images(
    scaling: Scaling, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_model(dataset, scaling)
    net = loaded.model
    assert isinstance(net, MetaGMVAE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = scaled_by_training_statistics(net, dataset, "test")
    fitted_again = loaded_model(dataset, scaling).model
    assert isinstance(fitted_again, MetaGMVAE)
    fit_feature_scaling(fitted_again, raw_features(net, dataset, "test").numpy())
    assert not torch.allclose(fitted_again.scale(raw_features(net, dataset, "test")).double(), expected, atol=0.1)

    received: list[Tensor] = []
    evaluate_features = module.evaluate_features

    def spy(model: MetaGMVAE, adapt: Any, h_nF: Tensor, *args: Any, **more: Any) -> Any:
        received.append(h_nF)
        return evaluate_features(model, adapt, h_nF, *args, **more)

    monkeypatch.setattr(module, "evaluate_features", spy)
    evaluate_tasks(loaded, dataset, [TASK], split="test")
    for h_nF in (*received, encode_split(net, dataset, "test", CPU), encode_images(net, dataset.images("test"), CPU)):
        assert torch.allclose(h_nF.double(), expected, atol=2e-2)
    assert len(received) == 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("scaling", ["standard", "whitened"])
def test_baselines_use_the_scaled_features_of_the_model(scaling: Scaling, dataset: Dataset) -> None:
    loaded, labels = loaded_model(dataset, scaling), dataset.labels("test")
    net = loaded.model
    assert isinstance(net, MetaGMVAE)
    (result,) = evaluate_tasks(loaded, dataset, [TASK], split="test", baselines=True)
    raw = raw_features(net, dataset, "test")
    for name, evaluate in BASELINES.items():
        on_scaled, on_raw = (evaluate(h_nF, labels, **TASK).accuracies for h_nF in (net.scale_features(raw), raw))
        assert not np.array_equal(on_scaled, on_raw), name
        assert np.array_equal(result.baselines[name].accuracies, on_scaled), name
        unscaled = result.baselines.get(f"{name}, features unscaled")
        assert unscaled is None or np.array_equal(unscaled.accuracies, on_raw), name
    assert "nearest class mean, features unscaled" in result.baselines


def test_baselines_are_tuned_on_the_validation_classes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_tuning, "all_baselines", lambda: {"soft k-means": soft_k_means})
    monkeypatch.setattr(baseline_tuning, "UNSCALED_BASELINES", ())
    loaded = loaded_model(dataset, "standard")
    settings = Settings.model_validate(loaded.settings.model_dump() | {"data": {"validation_split": "validation"}})
    (result,) = evaluate_tasks(replace(loaded, settings=settings), dataset, [TASK], split="test", baselines=True)
    net = loaded.model
    assert isinstance(net, MetaGMVAE)
    splits = []
    for split in ("test", "validation"):
        raw = raw_features(net, dataset, split)
        by_kind = {"scaled": net.scale_features(raw), "unscaled": raw}
        splits.append(baseline_tuning.SplitFeatures(split, dataset.labels(split), by_kind))
    expected = baseline_tuning.evaluate_baselines(splits[0], splits[1], TASK)["soft k-means"]
    found = result.baselines["soft k-means"]
    assert found.tuning == expected.tuning
    assert np.array_equal(found.accuracies, expected.accuracies)


def test_features_that_are_not_finite_are_an_error(dataset: Dataset) -> None:
    loaded = loaded_model(dataset, "standard")
    with torch.no_grad():
        next(loaded.model.encoder.parameters()).fill_(math.nan)
    with pytest.raises(DataError, match="its encoder gives features that are not finite"):
        evaluate_tasks(loaded, dataset, [TASK], split="test")
