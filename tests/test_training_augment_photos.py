"""Views of photos: colour changes equal torchvision's, crops stay inside the image, all keyed by the generator."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from metagmvae.training.augment import photos
from metagmvae.training.augment.photos import photo_view, shift_hue, to_grayscale


def random_images(n: int = 6, channels: int = 3, size: int = 24) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hue_shift_equals_torchvision() -> None:
    x = random_images()
    x[0, :, :4] = 0.5  # grey pixels have no hue
    shifts = torch.tensor([0.0, 0.1, -0.2, 0.5, -0.5, 0.2])
    theirs = torch.stack([tv.adjust_hue(image, float(shift)) for image, shift in zip(x, shifts, strict=True)])
    assert torch.allclose(shift_hue(x, shifts), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "theirs"),
    [
        (lambda x, f: photos._blend(x, torch.zeros_like(x), f), tv.adjust_brightness),
        (
            lambda x, f: photos._blend(x, to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True), f),
            tv.adjust_contrast,
        ),
        (lambda x, f: photos._blend(x, to_grayscale(x), f), tv.adjust_saturation),
    ],
)
def test_colour_changes_equal_torchvision(change, theirs) -> None:
    x, factors = random_images(), torch.tensor([0.2, 0.5, 1.0, 1.3, 1.8, 0.9])
    expected = torch.stack([theirs(image, float(factor)) for image, factor in zip(x, factors, strict=True)])
    assert torch.allclose(change(x, factors), expected, atol=1e-5)
    assert torch.allclose(to_grayscale(x), torch.stack([tv.rgb_to_grayscale(image, 3) for image in x]), atol=1e-6)


def test_views_depend_on_the_generator_and_differ_between_images() -> None:
    x = random_images(2).repeat(4, 1, 1, 1)
    first = photo_view(x, generator(), 12)
    assert first.shape == (8, 3, 12, 12)
    assert torch.equal(first, photo_view(x, generator(), 12))
    assert not torch.equal(first, photo_view(x, generator(1), 12))
    assert len({image.numpy().tobytes() for image in first}) == 8
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1


def test_fractions_of_jittered_and_grayscale_images(monkeypatch) -> None:
    monkeypatch.setattr(photos, "_random_crop", lambda images, generator, size, min_area: images)
    x = random_images(1).repeat(2000, 1, 1, 1)
    view = photo_view(x, generator(), 24)
    is_grey = (view.amax(dim=1) - view.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.03)
    unchanged = (view - x).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert float(unchanged[~is_grey].float().mean()) == pytest.approx(0.2, abs=0.03)


def test_crops_have_the_stated_areas_and_ratios_and_half_are_flipped() -> None:
    """Images of the pixel coordinates: their views show which rectangle was cropped."""
    axis = (torch.arange(64) + 0.5) / 32 - 1
    x = torch.stack([axis[None, :].expand(64, 64), axis[:, None].expand(64, 64), torch.zeros(64, 64)])
    view = photos._random_crop(x.expand(4000, -1, -1, -1), generator(), 32, 0.08)
    width = (view[:, 0, 0, -1] - view[:, 0, 0, 0]) * 32 / 31 / 2
    height = (view[:, 1, -1, 0] - view[:, 1, 0, 0]) * 32 / 31 / 2
    assert float((width < 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    area, ratio = width.abs() * height, width.abs() / height
    assert float(height.min()) > 0
    assert 0.07 < float(area.min()) < 0.09
    assert float(area.max()) > 0.9
    assert float(area.mean()) == pytest.approx(0.54, abs=0.04)  # large ones are clipped
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.4


def test_single_channel_images_are_supported() -> None:
    x = random_images(channels=1)
    view = photo_view(x, generator(), 24)
    assert view.shape == x.shape
    assert not torch.equal(view, photo_view(x, generator(2), 24))
