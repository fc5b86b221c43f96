"""The device that is used where the settings name none."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """Return the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
