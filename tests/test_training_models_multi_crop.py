"""Resizing to the encoder's input size, and multi-crop averaging in evaluation mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.configs.schema import Average
from metagmvae.training.models.encoders import EncoderModel, build_encoder, encoder_digest
from metagmvae.training.models.multi_crop import MultiCropEncoder, with_averaging

SHAPE = (3, 20, 26)
CROP = (17, 22)
"""Height and width of a crop: 85% of the sides."""


def images() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


def encoder(averaging: Average, image_size: int = 0) -> MultiCropEncoder:
    torch.manual_seed(0)
    net = build_encoder("conv4", SHAPE, 4, image_size, averaging=averaging)
    assert isinstance(net, MultiCropEncoder)
    return net.eval()


def literal_mean(net: MultiCropEncoder, x: Tensor) -> Tensor:
    """Mean over the 12 views, each cropped by indexing and resized to the network's input size."""
    height, width = CROP
    _, _, H, W = x.shape
    corners = [
        (0, 0),
        (0, W - width),
        (H - height, 0),
        (H - height, W - width),
        (round((H - height) / 2), (W - width) // 2),
    ]
    views = [x] + [x[:, :, top : top + height, left : left + width] for top, left in corners]
    total = torch.zeros(len(x), net.feature_dim)
    for view in views:
        for flipped in (view, torch.stack([image.flip(-1) for image in view])):
            total += net.net(F.interpolate(flipped, net.size, mode="bilinear", antialias=True))
    return total / 12


@pytest.mark.parametrize("image_size", [0, 16])
@torch.no_grad()
def test_features_are_the_mean_over_views(image_size: int) -> None:
    x, net = images(), encoder("crops", image_size)
    assert net.size == ((16, 16) if image_size else SHAPE[1:])
    assert torch.allclose(net(x), literal_mean(net, x), atol=1e-5)


@torch.no_grad()
def test_mirror_averaging_is_invariant_to_flips() -> None:
    x, net = images(), encoder("mirror")
    assert torch.allclose(net(x), net(x.flip(-1)), atol=1e-6)
    assert not torch.allclose(net(x), net.net(x), atol=1e-3)


def test_training_mode_encodes_each_image_once() -> None:
    x, net = images(), encoder("crops").train()
    without_averaging = encoder("crops").train().net
    assert torch.equal(net(x), without_averaging(x))


def test_digest_depends_on_the_averaging() -> None:
    nets = [encoder(averaging, 16) for averaging in ("none", "mirror", "crops")]
    assert len({encoder_digest(net) for net in nets}) == 3
    assert encoder_digest(with_averaging(nets[0], SHAPE[1:], "crops")) == encoder_digest(nets[2])
    plain = build_encoder("conv4", SHAPE, 4)
    averaged = with_averaging(plain, SHAPE[1:], "mirror")
    assert averaged.net is plain
    assert EncoderModel(averaged, SHAPE).feature_dim == plain.feature_dim
