"""The set encoder of q(z | x, D): self-attention without positions or LayerNorm (Lee et al., ICLR 2021, Eq. 5).

The paper (Tables 3 and 7) and its published code differ in the layer:

- `transformer` (paper): x + Out(attend(x)), then x + W2 act(W1 x);
- `set-attention` (published code): Q(x) + attend(x), then x + act(W x), without output projection.

Both are permutation-equivariant in the points of a set.

Notation: B sets, M data points per set, F width, H heads, d = F / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def elu(x: Tensor) -> Tensor:
    """ELU. For inference on a CPU as max(x, exp(min(x, 0)) - 1): ten times as fast, absolute error below 1e-7."""
    if x.is_cuda or x.dtype.itemsize < 4 or torch.is_grad_enabled():
        return F.elu(x)
    return torch.maximum(x, x.clamp_max(0).exp_().sub_(1))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu, "relu": F.relu}


class SetAttentionBlock(nn.Module):
    """One layer, (B, M, F) -> (B, M, F), with d_ff = F as in Table 3.

    Args:
        width: F.
        heads: H.
        scale: divide attention logits by sqrt(d) (`head`: paper), or by sqrt(F) (`model`: published code).
        block: see above.
        activation: ELU (Table 3), or ReLU (published code for Omniglot).
    """

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
        """Multi-head attention within each set, (B, M, F) -> (B, M, F)."""
        q_BHMd, k_BHMd, v_BHMd = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed_BHMd = F.scaled_dot_product_attention(q_BHMd, k_BHMd, v_BHMd, scale=self.scale)
        return mixed_BHMd.transpose(1, 2).flatten(2)


class SetAttention(nn.Module):
    """TransformerEncoder of Eq. 5: `layers` blocks, (B, M, F) -> (B, M, F); 0 layers are the identity."""

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
