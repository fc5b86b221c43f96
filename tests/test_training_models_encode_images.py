"""Encoding of many images: the precision that was asked for, whatever surrounds the call."""

from __future__ import annotations

import numpy as np
import torch

from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoders import EncoderModel, build_encoder

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)


def model() -> EncoderModel:
    torch.manual_seed(0)
    return EncoderModel(build_encoder("conv4", (3, 16, 16), 8), (3, 16, 16)).eval()


def test_bfloat16_only_where_it_is_asked_for() -> None:
    net = model()
    with torch.inference_mode():
        expected = net.encoder(torch.tensor(IMAGES).float() / 255)
    with torch.autocast("cpu", torch.bfloat16):
        exact = encode_images(net, IMAGES, CPU, raw=True)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-5)
    rounded = encode_images(net, IMAGES, CPU, raw=True, precision="bfloat16")
    assert rounded.dtype == torch.float32
    error = float((rounded - expected).norm() / expected.norm())
    assert 1e-4 < error < 3e-2
