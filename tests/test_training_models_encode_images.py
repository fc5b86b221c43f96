"""Encoding of many images in the precision that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metagmvae.configs.schema import Settings
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel, build_encoder
from metagmvae.training.trainer.training_features import training_features

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)


def model() -> EncoderModel:
    torch.manual_seed(0)
    return EncoderModel(build_encoder("conv4", (3, 16, 16), 8), (3, 16, 16)).eval()


def test_bfloat16_only_where_it_is_asked_for() -> None:
    net = model()
    with torch.inference_mode():
        expected = net.encoder(torch.tensor(IMAGES).float() / 255)
    torch.testing.assert_close(encode_images(net, IMAGES, CPU, raw=True), expected, rtol=0, atol=1e-5)
    rounded = encode_images(net, IMAGES, CPU, raw=True, precision="bfloat16")
    assert rounded.dtype == torch.float32
    error = float((rounded - expected).norm() / expected.norm())
    assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_features_have_the_precision_of_the_training(precision: str) -> None:
    net, settings = model(), Settings.model_validate({"data": {"uri": "unused"}, "train": {"precision": precision}})
    expected = encode_images(net, IMAGES, CPU, raw=True, precision=precision)  # type: ignore[arg-type]
    assert np.array_equal(training_features(net, settings, IMAGES, CPU), expected.numpy())
