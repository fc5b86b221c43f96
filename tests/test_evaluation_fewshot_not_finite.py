"""Probabilities that are not finite are an error wherever a model predicts: the argmax of NaN would count as chance."""

import numpy as np
import pytest
import torch
from small_model import SHAPE, model

from metagmvae.configs.schema import AdaptSettings
from metagmvae.evaluation.fewshot.evaluate_episodes import evaluate_images
from metagmvae.evaluation.fewshot.predict import log_posteriors
from metagmvae.evaluation.fewshot.predict_queries import predict_queries
from metagmvae.pipelines.records import DataError

TINY = AdaptSettings().model_copy(update={"samples": 4, "temperature": 1e-300})
"""Settings that an older version accepted."""
IMAGES = np.random.default_rng(0).integers(0, 256, (24, *SHAPE), dtype=np.uint8)
LABELS = np.repeat(np.arange(4), 6)


@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_a_tiny_temperature_is_an_error_and_no_accuracy(mode):
    net, task = model(torch.float32), {"way": 2, "shot": 1, "query": 2, "episodes": 3}
    features = torch.randn(12, net.feature_dim)
    with pytest.raises(DataError, match=r"NaN instead of probabilities: .* adapt.temperature \(1e-300\)"):
        evaluate_images(net, TINY, IMAGES, LABELS, mode=mode, **task)
    with pytest.raises(DataError, match="NaN"):
        predict_queries(net, TINY, features[:4], np.array([0, 0, 1, 1]), features[4:], mode=mode)
    with pytest.raises(DataError, match="NaN"):
        log_posteriors(net, TINY, features[None, :4, None], features[None, 4:], mode=mode, seed_by_episode=[0])


def test_broken_weights_are_an_error():
    net = model(torch.float32)
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(DataError, match="NaN instead of probabilities"):
        evaluate_images(net, AdaptSettings(samples=4), IMAGES, LABELS, way=2, shot=1, query=2, episodes=3)
