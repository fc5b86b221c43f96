"""Resizing to the encoder's input size, and multi-crop averaging in evaluation mode."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.configs.schema import Average
from metagmvae.training.models import multi_crop
from metagmvae.training.models.encoders import EncoderModel, build_encoder, encoder_digest
from metagmvae.training.models.multi_crop import MultiCropEncoder, affine_views

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
    nets = [encoder(averaging, 16) for averaging in ("none", "mirror", "crops", "affine")]
    assert len({encoder_digest(net) for net in nets}) == 4


@pytest.mark.parametrize(
    ("image_size", "averaging", "recorded"),
    [(16, "none", "ee33f47586d0e3b4"), (0, "crops", "13e913e91c1a3152"), (0, "none", "782220c7748f343b")],
)
def test_digests_of_older_versions_stay_valid(image_size: int, averaging: Average, recorded: str) -> None:
    net = build_encoder("conv4", SHAPE, 4, image_size, averaging=averaging)
    for position, (_, value) in enumerate(sorted(net.state_dict().items())):
        value.data.fill_(position)
    assert encoder_digest(net).startswith(recorded)


@pytest.mark.parametrize("name", ["conv4", "resnet18"])
@pytest.mark.parametrize("image_size", [0, 32])
def test_averaging_and_resizing_are_no_part_of_the_weights(name: str, image_size: int) -> None:
    shape = (3, 40, 40)
    plain = build_encoder(name, shape, 4)
    expected = plain.state_dict()
    for averaging in ("none", "mirror", "crops", "affine"):
        net = build_encoder(name, shape, 4, image_size, averaging=averaging)
        assert set(net.state_dict()) == set(expected)
        net.load_state_dict(expected)
        model = EncoderModel(net, shape)
        assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), weights(plain))
        # Older versions wrote the weights with the name of the wrapper.
        older = {f"encoder.net.{key}": value for key, value in expected.items()}
        other = EncoderModel(build_encoder(name, shape, 4, image_size, averaging="crops"), shape)
        other.load_state_dict(older)
        assert torch.equal(weights(other), weights(plain))
        plain.load_state_dict(net.state_dict())


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in module.parameters()])


def test_a_missing_weight_is_found() -> None:
    net = encoder("crops")
    state = net.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(state)


def bilinear(image: Tensor, x: float, y: float) -> float:
    """Value of a grey image at a position in pixels (0 at the centre of the first one), 0 outside of it."""
    H, W = image.shape
    left, top = math.floor(x), math.floor(y)
    value = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < H and 0 <= column < W:
                value += float(image[row, column]) * (1 - abs(x - column)) * (1 - abs(y - row))
    return value


@pytest.mark.parametrize("shape", [(28, 28), (20, 26)])
def test_affine_views_equal_a_rotation_and_a_shift_in_pixels(shape: tuple[int, int]) -> None:
    """Also of oblong images: the rotation is by 10 degrees in pixels, the shift 1/28 of each side."""
    H, W = shape
    x = torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(0))
    views = affine_views(x)
    corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]  # right, down
    assert len(views) == len(corners)
    for view, (right, down) in zip(views, corners, strict=True):
        angle = math.radians(10) * right * down
        expected = torch.zeros(H, W)
        for row in range(H):
            for column in range(W):
                # From the centre of the image, in pixels.
                across, along = column - (W - 1) / 2, row - (H - 1) / 2
                from_x = math.cos(angle) * across - math.sin(angle) * along + right * W / 28
                from_y = math.sin(angle) * across + math.cos(angle) * along + down * H / 28
                expected[row, column] = bilinear(x[0, 0], from_x + (W - 1) / 2, from_y + (H - 1) / 2)
        assert torch.allclose(view[0, 0], expected, atol=1e-4)


@torch.no_grad()
def test_affine_features_are_the_mean_over_five_views() -> None:
    x, net = images(), encoder("affine")
    expected = torch.stack([net.net(view) for view in (x, *affine_views(x))]).mean(dim=0)
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert not torch.allclose(net(x), net.net(x), atol=1e-3)


@torch.no_grad()
def test_affine_views_without_rotation_and_shift_are_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_crop, "ROTATION", 0.0)
    monkeypatch.setattr(multi_crop, "SHIFT", 0.0)
    x, net = images(), encoder("affine")
    assert torch.allclose(net(x), net.net(x), atol=1e-5)
