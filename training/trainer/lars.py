"""LARS, SimCLR's optimiser for large batches (You, Gitman and Ginsburg 2017). torch has no implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose learning rate per tensor is proportional to |weight| / |gradient|.

    One-dimensional tensors (biases, normalisation) have neither weight decay nor the adapted learning rate, as in
    SimCLR's published code.

    Args:
        parameters: tensors to train.
        lr: global learning rate.
        momentum: factor of the velocity.
        weight_decay: coupled (L2).
        trust: eta, the size of a step relative to |weight| at lr = 1.
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
                    weight_norm, update_norm = p.norm(), update.norm()
                    safe = (weight_norm > 0) & (update_norm > 0)
                    update = update * torch.where(safe, group["trust"] * weight_norm / update_norm, 1.0)
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(velocity)
        return loss
