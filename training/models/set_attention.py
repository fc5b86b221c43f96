"""The set encoder of q(z | x, D): self-attention without order or LayerNorm (Eq. 5, Tables 3 and 7).

Two forms of the layer, which differ in row 3 of the table of differences:

- `transformer` (paper): x + Out(attend(x)), then x + W2 act(W1 x);
- `set-attention` (published code): Q(x) + attend(x), then x + act(W x); no output projection.

Permutation-equivariant in the points of a set. B sets, M points, F = width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "relu": F.relu}


class SetAttentionBlock(nn.Module):
    """One layer, (B, M, F) -> (B, M, F); d_ff equals the width, as in Table 3."""

    def __init__(
        self,
        width: int,
        heads: int,
        scale: Literal["head", "model"] = "head",
        block: Literal["transformer", "set-attention"] = "transformer",
        activation: Literal["elu", "relu"] = "elu",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 1.0 / math.sqrt(width / heads if scale == "head" else width)
        self.activation = ACTIVATIONS[activation]
        self.project = nn.Linear(width, 3 * width)
        self.inner = nn.Linear(width, width)
        self.output: nn.Module | None = nn.Linear(width, width) if block == "transformer" else None
        self.outer: nn.Module | None = nn.Linear(width, width) if block == "transformer" else None

    def forward(self, x_BMF: Tensor) -> Tensor:
        query, key, value = self.project(x_BMF).chunk(3, dim=-1)
        mixed_BMF = self._attend(query, key, value)
        if self.output is None or self.outer is None:
            x_BMF = query + mixed_BMF
            return x_BMF + self.activation(self.inner(x_BMF))
        x_BMF = x_BMF + self.output(mixed_BMF)
        return x_BMF + self.outer(self.activation(self.inner(x_BMF)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q_BHMd, k_BHMd, v_BHMd = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed_BHMd = F.scaled_dot_product_attention(q_BHMd, k_BHMd, v_BHMd, scale=self.scale)
        return mixed_BHMd.transpose(1, 2).flatten(2)


class SetAttention(nn.Module):
    """TransformerEncoder of Eq. 5: `layers` blocks, (B, M, F) -> (B, M, F); with 0 layers the identity."""

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        scale: Literal["head", "model"] = "head",
        block: Literal["transformer", "set-attention"] = "transformer",
        activation: Literal["elu", "relu"] = "elu",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SetAttentionBlock(width, heads, scale, block, activation) for _ in range(layers))

    def forward(self, x_BMF: Tensor) -> Tensor:
        for block in self.blocks:
            x_BMF = block(x_BMF)
        return x_BMF
