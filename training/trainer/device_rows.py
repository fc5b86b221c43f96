"""Training data in the memory of the training device: batches are gathered there, only row indices are copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metagmvae.pipelines.records import Rows

CHUNK = 4096
"""Rows copied to the device at a time."""


class DeviceRows:
    """Images or features of a split on a device: `data[rows] -> (n, ...)` there, in the stored type."""

    def __init__(self, data: Rows, device: torch.device) -> None:
        count = len(data)
        pieces = [np.asarray(data[np.arange(first, min(first + CHUNK, count))]) for first in range(0, count, CHUNK)]
        self.tensor = torch.cat([torch.from_numpy(piece).to(device) for piece in pieces])
        self.shape = tuple(self.tensor.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return self.tensor[torch.as_tensor(rows, device=self.tensor.device)]
