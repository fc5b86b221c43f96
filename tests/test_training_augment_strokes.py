"""Views of strokes: keyed by the generator, same shape and range, the identity at strength 0."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from metagmvae.training.augment import strokes as strokes_module
from metagmvae.training.augment.strokes import stroke_view
from metagmvae.training.device.seeding import keyed_generator, uniform

view = partial(stroke_view, elastic=0.12)


def strokes(n: int, channels: int = 1, height: int = 20, width: int = 28) -> torch.Tensor:
    """Bright bars on a dark background."""
    images = torch.zeros(n, channels, height, width)
    for i in range(n):
        images[i, :, 4 + i % 5 : 7 + i % 5, 5:22] = 1.0
    return images


def generator(*key: int | str) -> torch.Generator:
    return keyed_generator(torch.device("cpu"), *key)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_shape_type_and_range(channels: int) -> None:
    images = strokes(64, channels)
    views = view(images, generator(0), strength=1.0)
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert float(views.min()) >= 0.0
    assert float(views.max()) <= 1.0
    assert float(views.max()) > 0.9  # the strokes are still visible
    assert ((views - images).abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_views_depend_on_every_part_of_the_key() -> None:
    images = strokes(8)
    first = view(images, generator(3, "views", 17))
    torch.rand(5)  # the global random state is not used
    assert torch.equal(first, view(images, generator(3, "views", 17)))
    for other in ((4, "views", 17), (3, "views", 18), (3, "other", 17)):
        assert not torch.equal(first, view(images, generator(*other)))


def test_views_differ_between_draws_and_between_images() -> None:
    images = strokes(1).expand(6, -1, -1, -1)
    same = generator(1)
    first, second = view(images, same), view(images, same)
    assert not torch.equal(first, second)
    assert len(torch.unique(first.flatten(1), dim=0)) == 6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (17, 30), (5, 4)])
def test_strength_zero_is_the_identity(channels: int, size: tuple[int, int]) -> None:
    images = torch.rand(10, channels, *size)
    assert torch.allclose(view(images, generator(0), strength=0.0), images, rtol=0, atol=1e-5)


def test_distortion_grows_with_strength() -> None:
    images = strokes(128)
    distances = [float((view(images, generator(0), strength=s) - images).abs().mean()) for s in (0.0, 0.1, 0.4, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-5 < distances[1]


def test_input_images_are_not_modified() -> None:
    images = strokes(4)
    before = images.clone()
    view(images, generator(0))
    assert torch.equal(images, before)


def test_stroke_width_changes_for_single_channel_images_only() -> None:
    """An empty image stays empty, and the total brightness varies more where the stroke width changes."""
    assert torch.equal(view(torch.zeros(8, 1, 28, 28), generator(0)), torch.zeros(8, 1, 28, 28))
    brightness = [float(view(strokes(256), generator(0)).sum(dim=(1, 2, 3)).std())]
    brightness.append(float(view(strokes(256, 3), generator(0))[:, :1].sum(dim=(1, 2, 3)).std()))
    assert brightness[0] > 1.2 * brightness[1]


def test_affine_map_equals_its_formula() -> None:
    """Pixel by pixel: [x, y] -> R(angle) [[e^across, shear], [0, e^down]] [x, y] + shift, for uniform draws."""
    images = torch.zeros(4, 1, 3, 5)
    draws = (0.8 * uniform((4, 6), images, generator(0))).tolist()
    grid = strokes_module._affine_grid(images, generator(0), 0.8)
    for i, (turn, across, down, shear, right, low) in enumerate(draws):
        cos, sin = math.cos(math.radians(25) * turn), math.sin(math.radians(25) * turn)
        for row in range(3):
            for column in range(5):
                x, y = (2 * column + 1) / 5 - 1, (2 * row + 1) / 3 - 1
                u, v = math.exp(0.25 * across) * x + 0.35 * shear * y, math.exp(0.25 * down) * y
                expected = [cos * u - sin * v + 0.2 * right, sin * u + cos * v + 0.2 * low]
                assert grid[i, row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_stroke_width_equals_its_formula() -> None:
    """Thicker: towards the largest neighbour; thinner: towards the mean of the pixel and its smallest neighbour."""
    images = torch.rand(6, 1, 5, 4, generator=generator("pixels"))
    amounts = (0.9 * uniform((6, 1, 1, 1), images, generator(0))).flatten().tolist()
    assert min(amounts) < 0 < max(amounts)
    changed = strokes_module._change_stroke_width(images, generator(0), 0.9)
    for image, amount, result in zip(images[:, 0], amounts, changed[:, 0], strict=True):
        for r in range(5):
            for c in range(4):
                near, pixel = image[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2], float(image[r, c])
                other = float(near.max()) if amount > 0 else (pixel + float(near.min())) / 2
                assert float(result[r, c]) == pytest.approx(pixel + abs(amount) * (other - pixel), abs=1e-6)


def test_elastic_deformation_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("ROTATION", "LOG_SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr("metagmvae.training.augment.strokes." + other, 0.0)
    monkeypatch.setattr("metagmvae.training.augment.strokes._change_stroke_width", lambda images, *_: images)
    images = strokes(64)
    assert torch.allclose(stroke_view(images, generator(0), elastic=0.0), images, rtol=0, atol=1e-5)
    # A displacement of 0.25 half widths of 28 pixels moves the edge by at most 3.5 pixels; bicubic interpolation
    # overshoots the control points by less than a fifth.
    left_half = torch.zeros(64, 1, 28, 28)
    left_half[..., :14] = 1.0
    edge = stroke_view(left_half, generator(0), elastic=0.25)[:, 0, 7:21].sum(dim=2)
    assert 1.0 < float((edge - 14).abs().max()) < 2 * 3.5 * 1.2


@pytest.mark.parametrize("size", [(20, 28), (2, 3), (1, 1)])
def test_largest_neighbours_equal_those_of_pooling_bit_for_bit(size: tuple[int, int]) -> None:
    x = torch.randn(3, 1, *size, generator=generator("pixels"))
    pooled = torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)
    assert torch.equal(strokes_module._largest_neighbour(x), pooled)
    windows = [
        x[..., max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].amax((1, 2, 3))
        for r in range(size[0])
        for c in range(size[1])
    ]
    assert torch.equal(torch.stack(windows, 1), pooled.flatten(1))
