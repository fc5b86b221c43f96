"""LARS against its formula."""

from __future__ import annotations

import math

import torch
from torch import nn

from metagmvae.training.trainer.lars import Lars


def test_updates_equal_the_formula() -> None:
    """v <- m v + lr * eta |w| / |g + d w| * (g + d w); w <- w - v. One dimension: v <- m v + lr g."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), nn.Parameter(torch.randn(3).double())
    optimizer = Lars([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.01)
    w, b = weight.detach().clone(), bias.detach().clone()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for _ in range(4):
        gw, gb = torch.randn_like(w), torch.randn_like(b)
        weight.grad, bias.grad = gw.clone(), gb.clone()
        optimizer.step()
        gradient_of_w = gw + 0.1 * w
        ratio = 0.01 * math.sqrt(float((w * w).sum())) / math.sqrt(float((gradient_of_w * gradient_of_w).sum()))
        vw, vb = 0.9 * vw + 0.5 * ratio * gradient_of_w, 0.9 * vb + 0.5 * gb
        w, b = w - vw, b - vb
        assert torch.allclose(weight.detach(), w)
        assert torch.allclose(bias.detach(), b)
