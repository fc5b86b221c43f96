"""Views of photos: colour changes equal torchvision's, crops stay inside the image, all keyed by the generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from scipy.stats import ks_2samp, kstest
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from metagmvae.training.augment import photos
from metagmvae.training.augment.photos import Crops, photo_view, shift_hue, to_grayscale


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
    monkeypatch.setattr(photos, "_random_crop", lambda images, *_: images)
    x = random_images(1).repeat(2000, 1, 1, 1)
    view = photo_view(x, generator(), 24)
    is_grey = (view.amax(dim=1) - view.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.03)
    unchanged = (view - x).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert float(unchanged[~is_grey].float().mean()) == pytest.approx(0.2, abs=0.03)


def cropped_rectangles(height: int, width: int, n: int, crops: Crops) -> Tensor:
    """(left, top, width, height) of n random crops, as fractions of the image; a width below 0 is flipped.

    The images are those of the pixel coordinates: their views show which rectangle was cropped. (Sampling at half a
    pixel within the image is exact.)
    """
    across, down = ((torch.arange(side) + 0.5) / side for side in (width, height))
    x = torch.stack([across.expand(height, -1), down[:, None].expand(-1, width), torch.zeros(height, width)])
    view = photos._random_crop(x.expand(n, -1, -1, -1), generator(), 2, 0.08, crops)
    first, last = view[:, :2, 0, 0], view[:, :2, 1, 1]
    # The two sampled points of each axis lie at 1/4 and 3/4 of the rectangle.
    sides = 2 * (last - first)
    return torch.cat([first - sides / 4, sides], dim=1)


def test_clipped_crops_have_the_stated_areas_and_ratios_and_half_are_flipped() -> None:
    left, top, width, height = cropped_rectangles(64, 64, 4000, "clipped").unbind(1)
    assert float((width < 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    left, width = left + width.clamp_max(0), width.abs()
    # Inside the image, at uniform positions that do not depend on each other.
    free = (width < 0.99) & (height < 0.99)
    across, down = ((first / (1 - side))[free].numpy() for first, side in ((left, width), (top, height)))
    for position in (across, down):
        assert -1e-3 < position.min() < position.max() < 1 + 1e-3
        assert kstest(position, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.06
    area, ratio = width * height, width / height
    assert float(height.min()) > 0
    assert 0.07 < float(area.min()) < 0.09
    assert float(area.max()) > 0.9
    assert float(area.mean()) == pytest.approx(0.534, abs=0.01)  # large ones are clipped
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.4


@pytest.mark.parametrize(("height", "width"), [(84, 84), (60, 90), (30, 100), (100, 24)])
def test_torchvision_crops_have_the_distribution_of_random_resized_crop(height: int, width: int) -> None:
    """Compared with its own `get_params`, by two-sample Kolmogorov-Smirnov tests; the last two sizes need its fallback,
    the largest central rectangle of an allowed ratio."""
    n, image = 4000, torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    top, left, rows, columns = torch.tensor(params).unbind(1)
    theirs = torch.stack([left / width, top / height, columns / width, rows / height], dim=1)
    ours = cropped_rectangles(height, width, n, "torchvision")
    assert float((ours[:, 2] < 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    flipped = ours[:, 2] < 0
    ours[:, 0] = torch.where(flipped, ours[:, 0] + ours[:, 2], ours[:, 0])
    ours[:, 2] = ours[:, 2].abs()
    pixels = ours * torch.tensor([width, height, width, height])
    assert torch.allclose(pixels, pixels.round(), atol=1e-2)  # whole pixels
    assert float(pixels[:, :2].min()) > -1e-2
    assert float((ours[:, :2] + ours[:, 2:]).max()) < 1 + 1e-4
    ours = pixels.round() / torch.tensor([width, height, width, height])
    features = [lambda r: r[:, 2] * r[:, 3], lambda r: r[:, 2] / r[:, 3], lambda r: r[:, 0], lambda r: r[:, 1]]
    features += [lambda r: r[:, 0] + r[:, 2] / 2, lambda r: r[:, 1] + r[:, 3] / 2]
    for feature in features:
        assert ks_2samp(feature(ours).numpy(), feature(theirs).numpy()).pvalue > 1e-3
    if height == width:
        area = ours[:, 2] * ours[:, 3]
        assert float(area.mean()) == pytest.approx(0.48, abs=0.012)


def test_photo_view_passes_the_kind_of_crop_on() -> None:
    x = random_images()
    clipped, redrawn = (photo_view(x, generator(), 24, crops=crops) for crops in ("clipped", "torchvision"))
    assert torch.equal(clipped, photo_view(x, generator(), 24))
    assert not torch.equal(clipped, redrawn)


RANGES = {
    "BRIGHTNESS": (0.8, tv.adjust_brightness, 1.0),
    "CONTRAST": (0.8, tv.adjust_contrast, 1.0),
    "SATURATION": (0.8, tv.adjust_saturation, 1.0),
    "HUE": (0.2, tv.adjust_hue, 0.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_colour_changes_have_the_ranges_of_simclr(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one change only, each view is that of torchvision for a factor from 1 - 0.8 to 1 + 0.8, or a hue shift from
    -0.2 to 0.2 of the circle (Appendix B of Lee et al.), and all of these occur."""
    bound, change, neutral = RANGES[name]
    monkeypatch.setattr(photos, "_random_crop", lambda images, *_: images)
    monkeypatch.setattr(photos, "GRAYSCALE_PROBABILITY", 0.0)
    monkeypatch.setattr(photos, "JITTER_PROBABILITY", 1.0)
    for other in RANGES.keys() - {name}:
        monkeypatch.setattr(photos, other, 0.0)
    image = 0.3 + 0.2 * random_images(1, size=4)  # nothing is clipped to [0, 1]
    views = photo_view(image.expand(2000, -1, -1, -1), generator(), 4)
    values = torch.linspace(neutral - bound, neutral + bound, 201)
    expected = torch.stack([change(image[0], float(value)) for value in values])
    nearest = torch.cdist(views.flatten(1), expected.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    step = torch.linalg.vector_norm((expected[1:] - expected[:-1]).flatten(1), dim=1).max()
    assert float(nearest.amin(dim=1).max()) < 0.7 * step
    assert float(nearest.amin(dim=0).max()) < 3 * step


def test_single_channel_images_are_supported() -> None:
    x = random_images(channels=1)
    view = photo_view(x, generator(), 24)
    assert view.shape == x.shape
    assert not torch.equal(view, photo_view(x, generator(2), 24))
