"""NT-Xent against SimCLR's Algorithm 1, value and gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch

from metagmvae.training.objectives.nt_xent import nt_xent


def features(images: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(images, size, generator=generator, dtype=torch.float64)
    return first, first + 0.5 * torch.randn(images, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 0.5, 5.0])
@pytest.mark.parametrize(("images", "size"), [(1, 2), (2, 3), (7, 5)])
def test_value_equals_algorithm_1(images: int, size: int, temperature: float) -> None:
    first, second = features(images, size)
    expected = reference.nt_xent(first.numpy(), second.numpy(), temperature)
    assert float(nt_xent(first, second, temperature)) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_gradient_equals_finite_differences_of_algorithm_1() -> None:
    """Central differences of the literal transcription, which shares no code with the loss."""
    first, second = features(4, 3, seed=1)
    leaves = torch.stack([first, second]).requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(leaves[0], leaves[1], 0.3), leaves)
    step, point = 1e-6, leaves.detach().numpy()
    for index in np.ndindex(point.shape):
        shifted = point.copy()
        shifted[index] += step
        above = reference.nt_xent(shifted[0], shifted[1], 0.3)
        shifted[index] -= 2 * step
        below = reference.nt_xent(shifted[0], shifted[1], 0.3)
        assert float(gradient[index]) == pytest.approx((above - below) / (2 * step), abs=1e-8)


def test_float32_is_close_to_float64_at_a_low_temperature() -> None:
    first, second = features(64, 32, seed=2)
    exact = float(nt_xent(first, second, 0.05))
    assert float(nt_xent(first.float(), second.float(), 0.05)) == pytest.approx(exact, abs=1e-6)
    assert nt_xent(first.bfloat16(), second.bfloat16(), 0.05).dtype == torch.float32


def test_loss_is_invariant_to_lengths_and_to_the_order_of_images_and_views() -> None:
    first, second = features(6, 4, seed=3)
    value = nt_xent(first, second, 0.2)
    order = torch.randperm(6)
    assert torch.allclose(nt_xent(first * 7, second * 0.1, 0.2), value, rtol=1e-12)
    assert torch.allclose(nt_xent(second, first, 0.2), value, rtol=1e-12)
    assert torch.allclose(nt_xent(first[order], second[order], 0.2), value, rtol=1e-12)


def test_equal_features_give_log_of_2n_minus_1() -> None:
    same = torch.ones(8, 4, dtype=torch.float64)
    assert float(nt_xent(same, same, 0.2)) == pytest.approx(math.log(15), rel=1e-12)


def test_zero_feature_gives_finite_loss_and_gradient() -> None:
    first, second = features(3, 4, seed=4)
    first[1] = 0.0
    leaf = first.requires_grad_()
    loss = nt_xent(leaf, second, 0.2)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_two_ranks_equal_one_process() -> None:
    """The mean over ranks of the loss against the views of all images is the loss of the whole batch."""
    first, second = features(4, 3, seed=5)
    halves = []
    for rank, part in enumerate((slice(0, 2), slice(2, 4))):
        views = iter([torch.nn.functional.normalize(view, dim=1) for view in (first, second)])
        halves.append(float(nt_xent(first[part], second[part], 0.2, gather=lambda _, v=views: next(v), rank=rank)))
    assert np.mean(halves) == pytest.approx(float(nt_xent(first, second, 0.2)), rel=1e-12)
