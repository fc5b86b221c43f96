"""Mean and covariance of the patches of images, against the patches themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metagmvae.training.models import patch_statistics as module
from metagmvae.training.models.conv import ConvBlock
from metagmvae.training.models.patch_statistics import patch_statistics


def compare_with_patches(x: Tensor, tolerance: float) -> None:
    patches = F.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1)
    mean, covariance = patch_statistics(x)
    assert torch.allclose(mean, patches.mean(dim=1), rtol=0, atol=tolerance)
    assert torch.allclose(covariance, torch.cov(patches, correction=0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 1), (2, 3), (9, 2), (8, 8), (11, 7)])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statistics_equal_those_of_the_patches(
    size: tuple[int, int], channels: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "EXACT_PIXELS", 20)
    x = torch.rand(5, channels, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    compare_with_patches(x, 1e-12)


def test_float32_images_give_the_statistics_to_seven_digits() -> None:
    torch.manual_seed(0)
    compare_with_patches(torch.rand(40, 3, 64, 64), 1e-6)


def test_outputs_without_variance_stay_finite() -> None:
    """Kernels that a linear relation between the channels makes zero: the variance is rounding, of any sign."""
    torch.manual_seed(0)
    grey = torch.rand(64, 1, 32, 32)
    block = ConvBlock(2, 9)
    with torch.no_grad():
        block.conv.weight.copy_((1e4 * torch.tensor([-0.3, 1.0])[:, None] * torch.eye(9)[:, None]).view(9, 2, 3, 3))
    out = block(torch.cat([grey, 0.3 * grey], dim=1))
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), block.conv.weight)[0]).all()
