"""LARS (You, Gitman, Ginsburg 2017), the optimiser of SimCLR for large batches; torch has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Lars(torch.optim.Optimizer):
    """Momentum with a rate for each tensor, in proportion to |w| / |gradient|.

    Biases and scales of normalisations (one dimension) are neither decayed nor given a rate of their own, as in
    SimCLR's published code.

    Args:
        parameters: to train.
        lr: global learning rate.
        momentum: of the velocity.
        weight_decay: coupled, L2.
        trust: eta, the share of |w| that a step may be at lr = 1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.dim() > 1:
                    update = update + group["weight_decay"] * p
                    size, slope = p.norm(), update.norm()
                    ratio = torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1.0)
                    update = update * ratio
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(velocity)
        return loss
