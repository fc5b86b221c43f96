"""Numerical precision of the networks, and its autocast context."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "auto"]


@lru_cache
def bfloat16_is_fast(device_type: str) -> bool:
    """Whether the device has bfloat16 instructions.

    CPUs without them emulate bfloat16: a training step of Conv4 took 8 times as long as in float32 (measured with AVX2
    only). CPUs with them need about half the time of float32.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch before 2.10 has no get_capabilities: float32 there.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast context of the networks; `auto` is bfloat16 where the device has instructions for it, else float32."""
    enabled = precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast(device.type))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def at_least_float32(t: Tensor) -> Tensor:
    """Convert half precisions, which autocast leaves, to float32; float32 and float64 stay unchanged."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
