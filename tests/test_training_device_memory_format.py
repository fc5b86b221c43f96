"""Channels-last images: equal values, and convolutions that keep the format, also for one channel."""

from __future__ import annotations

import copy

import pytest
import torch

from metagmvae.training.device.memory_format import channels_last
from metagmvae.training.models.conv import ConvEncoder


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 4)])
def test_images_stay_the_same_and_convolutions_give_maps_in_channels_last(channels: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, channels, *size)
    for images in (x, x[::2], x.flip(-1), x.transpose(2, 3), x[..., : size[1] // 2 + 1]):
        moved = channels_last(images)
        assert torch.equal(moved, images)
        maps = torch.nn.Conv2d(channels, 6, 3, padding=1)(moved)
        assert maps.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(channels_last(moved), images)


def test_one_channel_is_not_copied() -> None:
    x = torch.rand(2, 1, 8, 8)
    assert channels_last(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("channels", [1, 3])
def test_features_and_gradients_equal_those_of_the_other_format(channels: int) -> None:
    torch.manual_seed(0)
    net = ConvEncoder((channels, 28, 28), 8, final_relu=False).double()
    x = torch.rand(6, channels, 28, 28, dtype=torch.float64)
    results = []
    for images in (x, channels_last(x)):
        encoder = copy.deepcopy(net)
        h = encoder(images)
        h.square().sum().backward()
        results.append([h.detach(), *(p.grad for p in encoder.parameters())])
    for plain, moved in zip(*results, strict=True):
        torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-9)
