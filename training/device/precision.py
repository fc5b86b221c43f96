"""Which precision the networks run in, and its autocast context."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "auto"]


@lru_cache
def bfloat16_is_fast(device_type: str) -> bool:
    """Whether the device computes bfloat16 by instructions of its own.

    Processors without them emulate it: a training step of Conv4 took 8 times as long as in float32 (measured on one
    with AVX2 alone), where those with them halve it.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch before 2.10 does not tell: float32 there.
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context of the networks' computations; `auto` is bfloat16 where the device is fast at it, else float32."""
    enabled = precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast(device.type))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def at_least_float32(t: Tensor) -> Tensor:
    """Lift half precisions, in which autocast leaves a network's outputs; float32 and float64 stay."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
